"""Many firings at once: how often Redis is asked, and how long a locked file is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.firing import MOST_AT_ONCE, fire_all
from celery_triggers.testing.conformance.support import application_of, statuses
from celery_triggers.testing.conformance.test_fire_many import EACH, between_questions, into
from celery_triggers.testing.media import FakeApplication, Medium


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
