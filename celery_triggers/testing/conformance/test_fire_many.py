"""Many firings at once: each as if it were alone, in fewer round trips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_triggers.exceptions import EventConflict
from celery_triggers.manager.firing import ReadyFiring, fire_all
from celery_triggers.manager.pending import ready
from celery_triggers.testing.conformance.support import fired
from celery_triggers.testing.media import FakeApplication, Medium

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}, 't_pair': {'after': ['a', 'b'], 'run': 'x'}}


def into(
    medium: Medium, application: FakeApplication, *uids: str, trigger: str = 'a', **more: Any
) -> list[ReadyFiring]:
    return [
        ready(medium.manager(application, uid), trigger, {'n': number}, **more)
        for number, uid in enumerate(uids)
    ]


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
