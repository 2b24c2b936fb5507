"""Many firings at once: each as if it were alone, in fewer round trips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from celery_triggers.exceptions import EventConflict, StorageUnavailable
from celery_triggers.firing import MOST_AT_ONCE, ReadyFiring, fire_all
from tests.support import FakeApplication, Medium, application_of, fired, statuses

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}, 't_pair': {'after': ['a', 'b'], 'run': 'x'}}


def into(
    medium: Medium, application: FakeApplication, *uids: str, trigger: str = 'a', **more: Any
) -> list[ReadyFiring]:
    return [
        medium.manager(application, uid).ready(trigger, {'n': number}, **more)
        for number, uid in enumerate(uids)
    ]


@contextmanager
def pipelines(medium: Medium, spoil: Callable[[int], Any] = lambda _: None) -> Iterator[list[int]]:
    """Note the size of each pipeline that is sent to Redis, and that nothing else is sent.

    Args:
        spoil: Is called after each, with its number, in the place of its answer.
    """
    client: Any = medium.backend()._server.client  # type: ignore[attr-defined]
    real, alone, sent = client.pipeline, client.execute_command, []

    def counting(*args: Any, **options: Any) -> Any:
        pipeline = real(*args, **options)
        execute = pipeline.execute

        def noting(**kwargs: Any) -> Any:
            sent.append(len(pipeline))
            found = execute(**kwargs)
            spoil(len(sent))
            return found

        pipeline.execute = noting
        return pipeline

    def single(*args: Any, **options: Any) -> Any:
        sent.append(0)
        return alone(*args, **options)

    client.pipeline, client.execute_command = counting, single
    try:
        yield sent
    finally:
        del client.pipeline, client.execute_command


@pytest.fixture
def warm(redis_medium: Medium) -> tuple[Medium, FakeApplication]:
    """A Redis that knows the scripts."""
    application = redis_medium.application(EACH)
    redis_medium.manager(application, 'warm').fire('a')
    application.releases.clear()
    return redis_medium, application


def between_questions(
    monkeypatch: pytest.MonkeyPatch, medium: Medium, interfere: Callable[[], Any]
) -> None:
    """Call ``interfere`` once, after the first questions were answered."""
    kind: Any = type(medium.backend())
    real = kind.ask_many

    def asking(questions: Any) -> Any:
        found = real(questions)
        monkeypatch.undo()
        interfere()
        return found

    monkeypatch.setattr(kind, 'ask_many', asking)


def test_each_is_answered_in_its_place_and_applied_in_order(medium: Medium):
    application = medium.application(EACH)
    firings = fire_all(into(medium, application, 'x', 'y', 'x', 'z', 'x'))
    assert [(firing.uid, firing.created[0]) for firing in firings] == [
        ('x', 't_each#0'), ('y', 't_each#0'), ('x', 't_each#1'), ('z', 't_each#0'),
        ('x', 't_each#2'),
    ]
    history = medium.manager(application, 'x').storage.history
    assert [record.kwargs['n'] for record in history] == [0, 2, 4]
    assert sorted(application.released) == ['t_each#0'] * 3 + ['t_each#1', 't_each#2']


def test_nothing_to_fire_is_nothing_done(medium: Medium):
    assert fire_all([]) == []


def test_firings_into_many_sessions_share_round_trips(warm: tuple[Medium, FakeApplication]):
    medium, application = warm
    count = MOST_AT_ONCE + 50
    ready = into(medium, application, *(f's:{number}' for number in range(count)))
    with pipelines(medium) as sent:
        firings = fire_all(ready)
    assert sent == [MOST_AT_ONCE, MOST_AT_ONCE, 50, 50]
    assert [firing.uid for firing in firings] == [f's:{number}' for number in range(count)]
    assert len(application.released) == count


def test_firings_into_one_session_are_a_step_each(warm: tuple[Medium, FakeApplication]):
    medium, application = warm
    ready = into(medium, application, *['x'] * 3)
    with pipelines(medium) as sent:
        fire_all(ready)
    assert sent == [0] * 6, 'two round trips each, as alone'


def test_a_session_that_another_changes_is_decided_again(
    medium: Medium, monkeypatch: pytest.MonkeyPatch
):
    application = medium.application(EACH)
    other = medium.manager(application, 'y')
    between_questions(monkeypatch, medium, lambda: other.fire('b'))
    firings = fire_all(into(medium, application, 'x', 'y', 'z'))
    assert [len(firing.created) for firing in firings] == [2, 1, 2]
    assert firings[1].released == ['t_each#0', 't_pair#0']
    assert fired(other) == ['b', 'a']


def test_a_conflict_asks_again_for_that_session_alone(
    warm: tuple[Medium, FakeApplication], monkeypatch: pytest.MonkeyPatch
):
    medium, application = warm
    other = medium.manager(application, 'y')
    between_questions(monkeypatch, medium, lambda: other.fire('b'))
    ready = into(medium, application, 'x', 'y', 'z')
    with pipelines(medium) as sent:
        fire_all(ready)
    # What the other asked is among them: its firing is two questions.
    assert sent == [3, 0, 0, 3, 0]


def test_an_error_of_one_holds_up_none_beside_it_and_stops_what_follows(medium: Medium):
    application = medium.application(EACH)
    medium.manager(application, 'y').fire('b', event_id='taken')
    ready = [
        *into(medium, application, 'x'),
        *into(medium, application, 'y', event_id='taken'),
        *into(medium, application, 'z', 'z'),
    ]
    application.releases.clear()
    with pytest.raises(EventConflict) as caught:
        fire_all(ready)
    made = [firing and firing.uid for firing in caught.value.firings]
    assert made == ['x', None, 'z', None]
    assert application.released == ['t_each#0', 't_each#0']


def test_a_whole_repeat_with_event_ids_is_harmless(medium: Medium):
    application = medium.application(EACH)

    def ready() -> list[ReadyFiring]:
        return into(medium, application, 'x', 'y', 'z', event_id='e')

    first, again = fire_all(ready()), fire_all(ready())
    assert [firing.duplicate for firing in again] == [True] * 3
    assert [f.created for f in again] == [f.created for f in first]
    assert application.released == ['t_each#0'] * 3


def test_hooks_are_called_for_each(medium: Medium, monkeypatch: pytest.MonkeyPatch):
    application = medium.application(EACH)
    ready = into(medium, application, 'x', 'y')
    seen = []
    monkeypatch.setattr(
        type(ready[0].manager), '_post_fire',
        lambda self, trigger, scheduled: seen.append((self.uid, trigger, len(scheduled))),
    )
    fire_all(ready)
    assert seen == [('x', 'a', 1), ('y', 'a', 1)]


def test_a_redis_that_lost_its_scripts_learns_them_again(
    warm: tuple[Medium, FakeApplication]
):
    medium, application = warm
    client = redis.Redis.from_url(medium.url)
    client.script_flush()
    client.close()
    assert len(fire_all(into(medium, application, 'x', 'y', 'z'))) == 3
    assert application.released == ['t_each#0'] * 3


@pytest.mark.parametrize('lost', [1, 2])
def test_a_lost_answer_is_asked_for_again_and_nothing_is_doubled(
    warm: tuple[Medium, FakeApplication], lost: int
):
    medium, application = warm

    def spoil(number: int) -> None:
        if number == lost:
            raise redis.exceptions.ConnectionError('the answer was lost')

    ready = into(medium, application, 'x', 'y')
    with pipelines(medium, spoil) as sent:
        firings = fire_all(ready)
    assert sent == [2, 2, 2]
    assert [firing.duplicate for firing in firings] == [False, False]
    assert application.released == ['t_each#0'] * 2
    assert list(statuses(medium.manager(application, 'x'))) == ['t_each#0', 't_pair#0']


@pytest.mark.parametrize('lost', [1, 2])
def test_a_redis_that_goes_away_says_what_is_known(
    warm: tuple[Medium, FakeApplication], lost: int
):
    medium, application = warm

    def spoil(number: int) -> None:
        if number >= lost:
            raise redis.exceptions.ConnectionError('gone')

    ready = [
        *into(medium, application, 'x', event_id='one'), *into(medium, application, 'y', 'x'),
    ]
    with pipelines(medium, spoil) as sent, pytest.raises(StorageUnavailable) as caught:
        fire_all(ready)
    assert sent == [2] * (lost + 1), 'one more try, and nothing of the next wave'
    error = caught.value
    assert error.outcome_unknown is (lost == 2)
    assert error.event_id == 'one'
    assert error.firings == [None] * 3
    again = into(medium, application, 'x', event_id='one')
    assert fire_all(again)[0].duplicate is (lost == 2)


def test_a_file_that_is_locked_is_waited_for_once(sql_medium: Medium, tmp_path: Any):
    import sqlite3

    application = sql_medium.application(
        EACH, triggers_storage_options={'connect_args': {'timeout': 0.02}}
    )
    sql_medium.manager(application, 'x').start()
    ready = into(sql_medium, application, 'x', 'y', 'z')
    asked = []
    for firing in ready:
        storage: Any = firing.manager.storage

        def noting(*args: Any, real: Any = storage._commit, uid: str = storage.uid) -> Any:
            asked.append(uid)
            return real(*args)

        storage._commit = noting
    lock = sqlite3.connect(tmp_path / 'triggers.db', isolation_level=None)
    lock.execute('BEGIN IMMEDIATE')
    with pytest.raises(StorageUnavailable):
        fire_all(ready)
    lock.execute('ROLLBACK')
    lock.close()
    assert asked == ['x']
    assert application_of(sql_medium.manager(application, 'x')).released == []
