"""Delayed firings: accepted at once, applied once when they are due, or taken back."""

from __future__ import annotations

import pickle
import threading
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import (
    EventConflict,
    InvalidFiring,
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.manager import Firing, TriggerManager
from celery_triggers.sweep.sweep import OverdueFiring
from celery_triggers.testing.conformance.support import application_of, eventually, fired
from celery_triggers.testing.conformance.test_sweep import did, dues, sweep, sweep_in_threads
from celery_triggers.testing.media import Medium

CONFIGURATION = {'t_x': {'run': 'x', 'after': ['a']}, 't_y': {'run': 'y', 'andEvery': 'a'}}

SOON = 0.2


def now_of(manager: TriggerManager) -> datetime:
    return datetime.fromtimestamp(manager.storage.read(Plan()).now / 1000, timezone.utc)


def wait_for(manager: TriggerManager, firing: Firing) -> None:
    """Wait until a firing is due by the storage's clock."""
    due = firing.due
    assert due is not None
    eventually(lambda: now_of(manager) > due, 'it is due')


def swept(medium: Medium, manager: TriggerManager) -> dict[str, int]:
    """Sweep until something is found to do."""
    return eventually(lambda: did(sweep(medium, manager)), 'something is due')


def test_it_is_accepted_at_once_and_applied_when_it_is_due(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    before = now_of(manager)
    firing = manager.fire('a', {'n': 1}, countdown=SOON)
    assert (firing.pending, firing.duplicate) == (True, False)
    assert firing.due is not None
    assert before + timedelta(seconds=SOON) <= firing.due
    assert firing.due <= now_of(manager) + timedelta(seconds=SOON)
    assert (firing.heard_by, firing.created, firing.released) == ([], [], [])
    assert manager.storage.instances == {}
    assert dues(medium, manager) == {
        f'{firing.event_id}~': round(firing.due.timestamp() * 1000)
    }
    assert swept(medium, manager) == {'fired': 1}
    assert application_of(manager).released == ['t_x#0', 't_y#0']
    assert fired(manager) == ['a']
    assert manager.storage['t_x#0'].kwargs == {'a': {'n': 1}}
    assert set(dues(medium, manager)) == {'t_x#0', 't_y#0'}
    assert did(sweep(medium, manager)) == {}
    assert manager.storage.load().delayed == {}


def test_it_is_not_applied_early(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', eta=datetime.now(timezone.utc) + timedelta(hours=1))
    at = dues(medium, manager)
    found = manager.storage.read(Plan(delayed=frozenset({firing.event_id}))).session
    assert found.delayed[firing.event_id].due == at[f'{firing.event_id}~']
    assert did(sweep(medium, manager)) == {}
    assert fired(manager) == []


def test_a_date_that_is_looked_at_too_early_is_put_back(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', countdown=3600)
    before = dues(medium, manager)
    assert OverdueFiring(manager, f'{firing.event_id}~', firing.event_id).see_to() == 'postponed'
    assert dues(medium, manager) == before
    assert fired(manager) == []


@pytest.mark.parametrize('countdown', [0, -5, 0.0])
def test_what_is_due_already_is_applied_now(medium: Medium, countdown: float):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', countdown=countdown)
    assert (firing.pending, firing.due, firing.released) == (False, None, ['t_x#0', 't_y#0'])
    past = datetime.now(timezone.utc) - timedelta(days=1)
    assert manager.fire('a', eta=past).released == ['t_y#1']


def test_an_eta_in_any_zone_is_that_moment(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    eta = datetime(2130, 5, 2, 18, tzinfo=timezone(timedelta(hours=2)))
    assert manager.fire('a', eta=eta).due == eta


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'countdown': 1, 'eta': datetime.now(timezone.utc)}, 'not both'),
        ({'countdown': '1'}, 'countdown of seconds'),
        ({'countdown': True}, 'countdown of seconds'),
        ({'countdown': float('inf')}, 'countdown of seconds'),
        ({'countdown': float('nan')}, 'countdown of seconds'),
        ({'eta': datetime(2130, 1, 1)}, 'aware datetime'),
        ({'eta': 1234567890}, 'aware datetime'),
    ],
)
def test_a_delay_that_is_none_is_refused(medium: Medium, options: Any, words: str):
    manager = medium.manager(CONFIGURATION)
    with pytest.raises(InvalidFiring, match=words):
        manager.fire('a', **options)
    assert not manager.storage.exists


def test_its_event_id_is_taken_at_once(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    first = manager.fire('a', {'n': 1}, event_id='e', countdown=SOON)
    again = manager.fire('a', {'n': 1}, event_id='e')
    assert (again.duplicate, again.pending, again.due) == (True, True, first.due)
    with pytest.raises(EventConflict):
        manager.fire('a', {'n': 2}, event_id='e')
    assert swept(medium, manager) == {'fired': 1}
    later = manager.fire('a', {'n': 1}, event_id='e', countdown=60)
    assert (later.duplicate, later.pending) == (True, False)
    assert later.heard_by == ['t_x', 't_y']
    assert later.released == ['t_x#0', 't_y#0']
    assert fired(manager) == ['a']


def test_it_can_be_taken_back(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', event_id='e', countdown=3600)
    assert firing.cancel()
    assert not firing.cancel()
    assert dues(medium, manager) == {}
    again = manager.fire('a', event_id='e')
    assert (again.duplicate, again.pending, again.released) == (True, False, [])
    assert fired(manager) == []


def test_a_repeat_can_take_it_back_too(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    manager.fire('a', event_id='e', countdown=3600)
    assert manager.fire('a', event_id='e', countdown=3600).cancel()
    assert not manager.cancel_firing('e')
    assert not manager.cancel_firing('unknown')


def test_a_copy_says_how_to_take_it_back(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', event_id='e', countdown=3600)
    copy = pickle.loads(pickle.dumps(firing))
    assert copy == firing
    assert asdict(copy) == asdict(firing)
    with pytest.raises(TriggersError, match=r"session\('order:1'\).cancel_firing\('e'\)"):
        copy.cancel()
    assert manager.cancel_firing('e')


def test_what_was_applied_cannot_be_taken_back(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', countdown=SOON)
    swept(medium, manager)
    assert not firing.cancel()
    assert not manager.fire('b').cancel()
    assert fired(manager) == ['a', 'b']


def test_a_deleted_session_applies_nothing(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    firing = manager.fire('a', event_id='e', countdown=SOON)
    assert manager.storage.delete()
    assert dues(medium, manager) == {}
    assert not firing.cancel()
    other = manager.fire('a', event_id='e', countdown=3600)
    assert not other.duplicate
    wait_for(manager, firing)
    assert did(sweep(medium, manager)) == {}
    assert fired(manager) == []


def test_what_is_due_in_a_deleted_session_is_forgotten(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    manager.fire('b')
    firing = manager.fire('a', countdown=SOON)
    wait_for(manager, firing)
    manager.storage.delete()
    manager.fire('b')
    assert did(sweep(medium, manager)) == {}
    assert fired(manager) == ['b']


def test_a_cancelled_session_gives_birth_to_abandoned_instances(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    manager.fire('a', countdown=SOON)
    manager.cancel()
    assert swept(medium, manager) == {'fired': 1}
    assert {i.status.value for i in manager.storage} == {'abandoned'}


def test_many_sweeps_apply_each_once(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    number = 24
    for n in range(number):
        last = manager.fire('a', {'n': n}, countdown=SOON)
    wait_for(manager, last)
    sweep_in_threads(medium, manager, count=4, limit=5)
    eventually(lambda: manager.storage.load().delayed == {} or not sweep(medium, manager))
    assert sorted(r.kwargs['n'] for r in manager.storage.history) == list(range(number))
    payloads = [i.kwargs['a']['n'] for i in manager.storage.instances_of_task('t_y')]
    assert sorted(payloads) == list(range(number))


def test_taking_back_and_applying_at_once_does_one_of_them(medium: Medium):
    manager = medium.manager(CONFIGURATION)
    for number in range(10):
        firing = manager.fire('a', {'n': number}, event_id=f'e{number}', countdown=0.02)
        wait_for(manager, firing)
        answers: list[bool] = []
        barrier = threading.Barrier(2)

        def cancel(firing: Any = firing, answers: Any = answers, barrier: Any = barrier) -> None:
            barrier.wait()
            answers.append(firing.cancel())

        thread = threading.Thread(target=cancel)
        thread.start()
        barrier.wait()
        sweep(medium, manager)
        thread.join()
        eventually(lambda: manager.storage.load().delayed == {} or not sweep(medium, manager))
        applied = [r.kwargs['n'] for r in manager.storage.history].count(number)
        assert applied == (0 if answers == [True] else 1)


def test_a_session_does_not_go_while_one_is_to_come(medium: Medium):
    manager = medium.manager(CONFIGURATION, triggers_session_expires=0.001)
    firing = manager.fire('z', countdown=3600)
    eventually(lambda: did(sweep(medium, manager)).get('postponed'))
    assert manager.storage.exists
    assert firing.cancel()
    eventually(lambda: did(sweep(medium, manager)).get('deleted'))


def test_an_answer_that_was_lost_is_found_again(medium: Medium, monkeypatch: pytest.MonkeyPatch):
    manager = medium.manager(CONFIGURATION)
    real = type(manager.storage)._commit
    lost: list[int] = []

    def loses_the_answer(self: Any, commit: Any, request: Any) -> Any:
        answer = real(self, commit, request)
        if not lost:
            lost.append(1)
            raise StorageUnavailable('no answer', outcome_unknown=True)
        return answer

    monkeypatch.setattr(type(manager.storage), '_commit', loses_the_answer)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', {'n': 1}, countdown=SOON)
    again = manager.fire('a', {'n': 1}, event_id=caught.value.event_id, countdown=SOON)
    assert again.duplicate
    assert again.pending
    assert swept(medium, manager) == {'fired': 1}
    assert fired(manager) == ['a']


def test_deadlines_count_from_when_it_is_applied(medium: Medium):
    manager = medium.manager({'t_x': {'run': 'x', 'after': ['a', 'b'], 'within': 3600}})
    manager.fire('a', countdown=SOON)
    assert manager.storage.instances == {}
    swept(medium, manager)
    [record] = manager.storage.history
    deadline = manager.storage['t_x#0'].deadline
    assert deadline is not None
    assert round(deadline.timestamp() * 1000) == record.at + 3_600_000
