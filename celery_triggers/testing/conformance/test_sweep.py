"""What the sweep does about each kind of overdue instance, on every storage."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import StorageUnavailable, with_context
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.pending import ready
from celery_triggers.storages.records import Write
from celery_triggers.sweep import Sweep, SweepReport
from celery_triggers.testing.conformance.support import (
    application_of,
    before_commit,
    delivery,
    eventually,
    fired,
    lose_answer,
    statuses,
)
from celery_triggers.testing.media import FakeApplication, Medium
from celery_triggers.wiring import StoredOutcome

CONFIGURATION = {
    't_x': {'after': ['a'], 'run': 'x'},
    't_next': {'after': ['t_x'], 'run': 'next'},
    't_sorry': {'after': ['t_x:failed'], 'run': 'sorry'},
}
PAIR = {'t_x': {'after': ['a', 'b'], 'run': 'x'}}
WORKER_LOST = StoredOutcome('FAILURE', Exception('gone'), 10**15)


def sweep(medium: Medium, manager: TriggerManager, limit: int = 1000) -> SweepReport:
    class_ = medium.storage_class
    return Sweep(application_of(manager), class_, medium.url).run(limit)


def sweep_in_threads(medium: Medium, manager: TriggerManager, count: int, limit: int) -> None:
    """Sweep beside each other, each for so long as it finds something due."""
    barrier = threading.Barrier(count)

    def sweep_on() -> None:
        barrier.wait()
        while sweep(medium, manager, limit).taken:
            pass

    threads = [threading.Thread(target=sweep_on) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def did(report: SweepReport) -> dict[str, int]:
    """Return what a report counted."""
    names = [n for n in SweepReport.__slots__ if n not in ('taken', 'more', 'next_at')]
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def dues(medium: Medium, manager: TriggerManager) -> dict[str, int]:
    class_ = medium.storage_class
    found = class_.due_dates(medium.url, application_of(manager).settings)
    return {name: at for _, name, at in found}


def hasten(manager: TriggerManager, name: str = 't_x#0', **columns: Any) -> None:
    """Make an instance due now."""
    incarnation = manager.storage.load().head.incarnation
    assert manager.storage.write(Write(name, incarnation, [{}], columns, due=1))[0]


def released(medium: Medium, **settings: Any) -> TriggerManager:
    manager = medium.manager(CONFIGURATION, **settings)
    manager.fire('a')
    return manager


def running(medium: Medium, loss: str = 'fail', **settings: Any) -> tuple[TriggerManager, Delivery]:
    manager = released(medium, **settings)
    run = delivery(manager, 't_x#0')
    run.loss = loss
    assert run.claim()
    return manager, run


def confirm(manager: TriggerManager) -> bool:
    release = application_of(manager).releases[-1]
    return manager.storage.write(release.confirm_write())[0]


# ------------------------------------------------------------------ due dates themselves


def test_only_what_is_on_its_way_has_a_due_date(medium: Medium):
    manager = medium.manager({**CONFIGURATION, 't_wait': {'after': ['a', 'b'], 'run': 'w'}})
    manager.fire('a')
    assert set(dues(medium, manager)) == {'t_x#0'}
    run = delivery(manager, 't_x#0')
    run.claim()
    assert dues(medium, manager)['t_x#0'] == manager.storage['t_x#0'].record.lease
    run.finish(None)
    assert set(dues(medium, manager)) == {'t_next#0'}


@pytest.mark.parametrize('end', ['fail', 'revoke', 'skip', 'replay'])
def test_each_end_takes_the_due_date_away(medium: Medium, end: str):
    manager, run = running(medium)
    arguments: dict[str, Any] = {
        'fail': ('raised', {}), 'revoke': ('revoked',), 'skip': (None,), 'replay': (None, None, 0),
    }
    assert getattr(run, end)(*arguments[end])
    assert 't_x#0' not in dues(medium, manager)


def test_nothing_due_is_nothing_to_do(medium: Medium):
    manager = released(medium)
    report = sweep(medium, manager)
    assert (report.taken, report.more, did(report)) == (0, False, {})
    assert report.next_at is not None
    assert len(application_of(manager).releases) == 1


# -------------------------------------------------------------------------- scheduled


def test_what_was_not_confirmed_is_sent(medium: Medium):
    manager = released(medium)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'sent': 1}
    first, again = application_of(manager).releases
    assert again.header == first.header
    assert again.config.run == 'x'


def test_a_confirmed_message_is_sent_again_after_a_long_time_that_grows(medium: Medium):
    manager = released(medium, triggers_redeliver_after=1000)
    for number in range(3):
        before = manager.storage.read(Plan()).now
        assert confirm(manager)
        due = dues(medium, manager)['t_x#0']
        assert 0 <= due - before - 1000_000 * 2**number < 10_000
        assert not confirm(manager), 'the same confirmation counts once'
        hasten(manager)
        assert did(sweep(medium, manager)) == {'sent': 1}
    assert manager.storage['t_x#0'].record.sends == 3


def test_an_instance_that_no_worker_ever_claims_fails(medium: Medium):
    manager = released(medium, triggers_max_deliveries=2)
    hasten(manager, sends=2)
    assert did(sweep(medium, manager)) == {'failed': 1}
    assert statuses(manager)['t_x#0'] == 'failed'
    assert manager.storage['t_x#0'].metadata['reason'] == 'not delivered'
    assert fired(manager) == ['a', 't_x:failed']


def test_a_confirmation_never_moves_the_date_of_what_runs(medium: Medium):
    manager, _ = running(medium)
    before = dues(medium, manager)
    assert not confirm(manager)
    assert dues(medium, manager) == before


def test_a_long_retry_is_sent_when_it_is_time_and_not_before(medium: Medium):
    manager, run = running(medium)
    run.retry(3600)
    record = manager.storage['t_x#0'].record
    assert dues(medium, manager)['t_x#0'] == record.eta
    assert len(application_of(manager).releases) == 1
    hasten(manager)  # early
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert dues(medium, manager)['t_x#0'] == record.eta
    hasten(manager, eta=1)
    assert did(sweep(medium, manager)) == {'sent': 1}
    assert application_of(manager).releases[-1].header['attempt'] == 1


def test_a_short_retry_is_sent_at_once_and_claimed_when_it_is_time(medium: Medium):
    manager, run = running(medium)
    run.retry(0.3, {'options': {'queue': 'other'}})
    release = application_of(manager).releases[-1]
    assert release.instance.record.message == {'options': {'queue': 'other'}}
    assert 0 < release.delay <= 300
    following = delivery(manager, 't_x#0', 'two')
    began = time.monotonic()
    assert following.claim()  # waits: clocks differ
    assert time.monotonic() - began > 0.2


def test_a_message_that_comes_far_too_early_is_left_to_its_due_date(medium: Medium):
    manager, run = running(medium)
    run.retry(3600)
    record = manager.storage['t_x#0'].record
    assert not delivery(manager, 't_x#0', 'two').claim()
    assert statuses(manager)['t_x#0'] == 'scheduled'
    assert dues(medium, manager)['t_x#0'] == record.eta


def test_a_task_that_makes_no_claim_is_never_sent_twice(medium: Medium, monkeypatch: Any):
    monkeypatch.setattr(FakeApplication, 'makes_claims', lambda *_: False)
    manager = released(medium)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'sent': 1}
    confirm(manager)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    application = application_of(manager)
    application.outcomes[manager.storage['t_x#0'].task_id] = StoredOutcome('SUCCESS', {'n': 1})
    hasten(manager)
    assert did(sweep(medium, manager)) == {'repaired': 1}
    assert statuses(manager)['t_x#0'] == 'finished'


def test_a_task_that_is_not_known_here_is_left_to_those_who_know_it(
    medium: Medium, monkeypatch: Any
):
    monkeypatch.setattr(FakeApplication, 'makes_claims', lambda *_: None)
    manager = released(medium)
    confirm(manager)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert len(application_of(manager).releases) == 1


# ---------------------------------------------------------------------------- running


def test_a_lease_that_was_renewed_is_left_alone(medium: Medium):
    manager, _ = running(medium)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert dues(medium, manager)['t_x#0'] == manager.storage['t_x#0'].record.lease


def test_a_heartbeat_renews_the_lease_of_what_runs(medium: Medium):
    manager, run = running(medium)
    hasten(manager, lease=1, spared=1)
    assert manager.storage.write(run.beat_write())[0]
    record = manager.storage['t_x#0'].record
    assert record.lease > manager.storage.read(Plan()).now
    assert record.spared == 0
    assert dues(medium, manager)['t_x#0'] == record.lease
    stranger = delivery(manager, 't_x#0', 'another')
    assert not manager.storage.write(stranger.beat_write())[0]


def test_a_heartbeat_keeps_what_a_worker_holds_from_being_sent_again(medium: Medium):
    manager = released(medium)
    hasten(manager)
    assert manager.storage.write(delivery(manager, 't_x#0').beat_write())[0]
    assert sweep(medium, manager).taken == 0
    assert statuses(manager)['t_x#0'] == 'scheduled'


def test_the_first_pass_after_an_outage_spares_and_the_next_judges(medium: Medium):
    manager, _ = running(medium)
    hasten(manager, lease=1)
    assert did(sweep(medium, manager)) == {'spared': 1}
    record = manager.storage['t_x#0'].record
    assert record.lease > manager.storage.read(Plan()).now
    assert dues(medium, manager)['t_x#0'] == record.lease
    hasten(manager, lease=1)
    assert did(sweep(medium, manager)) == {'failed': 1}


def test_a_pass_in_calm_times_judges_at_once(medium: Medium):
    manager, _ = running(medium, triggers_lease=0.5)

    def swept() -> dict[str, int]:
        # Spared again and again it would be judged, calm or not.
        hasten(manager, lease=1, spared=0)
        return did(sweep(medium, manager))

    assert swept() == {'spared': 1}, 'nobody had looked for long'
    eventually(lambda: swept() == {'failed': 1})
    assert statuses(manager)['t_x#0'] == 'failed'


def test_a_lost_worker_fails_its_instance(medium: Medium):
    manager, _ = running(medium)
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'failed': 1}
    instance = manager.storage['t_x#0']
    assert instance.metadata['reason'] == 'worker lost'
    assert instance.metadata['exception']['type'] == 'WorkerLostError'
    assert fired(manager) == ['a', 't_x:failed']


def test_a_lost_worker_that_acknowledges_late_gives_its_instance_to_another(medium: Medium):
    manager, lost = running(medium, 'again')
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'again': 1}
    record = manager.storage['t_x#0'].record
    assert (record.status, record.attempt, record.token, record.lost) == (
        'scheduled', 0, '', ['token'],
    )
    assert application_of(manager).releases[-1].header == dict(lost.header)
    following = delivery(manager, 't_x#0', 'two')
    assert following.claim()
    # What the lost one still says counts for nothing, unless it says that all is done.
    assert not lost.fail('raised', {})
    assert not lost.retry(0)
    assert not lost.revoke('revoked')
    assert lost.finish({'n': 1})
    assert not following.finish({'n': 2})
    assert manager.storage['t_x#0'].result == {'n': 1}
    assert fired(manager) == ['a', 't_x']


def test_a_report_of_a_claim_that_was_given_up_does_not_touch_what_waits(medium: Medium):
    manager, lost = running(medium, 'again')
    hasten(manager, lease=1, spared=1)
    sweep(medium, manager)
    lost.claimed = False  # the parent does not know
    assert not lost.fail('time limit', {})
    assert not lost.lose('gone')
    assert statuses(manager)['t_x#0'] == 'scheduled'


def test_an_attempt_that_loses_worker_after_worker_fails(medium: Medium):
    manager, _ = running(medium, 'again', triggers_max_deliveries=3)
    for number in range(3):
        hasten(manager, lease=1, spared=1)
        assert did(sweep(medium, manager)) == ({'again': 1} if number < 2 else {'failed': 1})
        if number < 2:
            run = delivery(manager, 't_x#0', f'next-{number}')
            run.loss = 'again'
            # Claimed before its time it would wait.
            hasten(manager, eta=1)
            assert run.claim()
    assert manager.storage['t_x#0'].metadata['reason'] == 'worker lost'


@pytest.mark.parametrize(('loss', 'replays'), [('replay:', 5), ('replay:2', 2), ('replay:0', 0)])
def test_a_lost_instance_is_replayed_so_many_times(medium: Medium, loss: str, replays: int):
    manager, _ = running(medium, loss)
    for number in range(replays):
        hasten(manager, f't_x#{number}', lease=1, spared=1)
        assert did(sweep(medium, manager)) == {'replayed': 1}
        run = delivery(manager, f't_x#{number + 1}')
        run.loss = loss
        assert run.claim()
    assert manager.storage[f't_x#{replays}'].depth == replays
    if loss != 'replay:':
        hasten(manager, f't_x#{replays}', lease=1, spared=1)
        assert did(sweep(medium, manager)) == {'failed': 1}


def test_a_heartbeat_that_comes_between_saves_the_run(medium: Medium, monkeypatch: Any):
    manager, run = running(medium, triggers_lease=60)
    hasten(manager, lease=1, spared=1)
    application = application_of(manager)

    def beats_just_now(task_id: str) -> None:
        manager.storage.write(run.beat_write())

    monkeypatch.setattr(application, 'stored_outcome', beats_just_now)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert statuses(manager)['t_x#0'] == 'running'


def test_the_result_backend_is_asked_before_a_worker_is_given_up(medium: Medium):
    manager, _ = running(medium, 'again')
    task_id = manager.storage['t_x#0'].task_id
    application_of(manager).outcomes[task_id] = StoredOutcome('SUCCESS', {'n': 7})
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'repaired': 1}
    assert manager.storage['t_x#0'].result == {'n': 7}
    assert fired(manager) == ['a', 't_x']


@pytest.mark.parametrize('state', ['FAILURE', 'REVOKED'])
def test_a_stored_failure_is_left_to_a_worker_that_has_just_been_heard_of(
    medium: Medium, monkeypatch: pytest.MonkeyPatch, state: str
):
    manager, run = running(medium, 'again')
    hasten(manager, lease=1, spared=1)
    application = application_of(manager)

    def beats_just_now(_: str) -> StoredOutcome:
        assert manager.storage.write(run.beat_write())[0]
        return StoredOutcome(state, ValueError('of an earlier delivery'), 10**15)

    monkeypatch.setattr(application, 'stored_outcome', beats_just_now)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert statuses(manager)['t_x#0'] == 'running'
    assert run.finish({'n': 1}), 'it goes on undisturbed'


@pytest.mark.parametrize(
    ('outcome', 'status', 'reason'),
    [
        (StoredOutcome('FAILURE', ValueError('bad'), 10**15), 'failed', 'raised'),
        (StoredOutcome('REVOKED', Exception('stop'), 10**15), 'revoked', 'revoked'),
        (StoredOutcome('FAILURE', ValueError('of an earlier run'), 1), 'failed', 'worker lost'),
        (StoredOutcome('FAILURE', ValueError('undated')), 'failed', 'worker lost'),
    ],
    ids=['failure', 'revoked', 'older', 'undated'],
)
def test_only_a_failure_newer_than_the_claim_counts(
    medium: Medium, outcome: StoredOutcome, status: str, reason: str
):
    manager, _ = running(medium)
    application_of(manager).outcomes[manager.storage['t_x#0'].task_id] = outcome
    hasten(manager, lease=1, spared=1)
    sweep(medium, manager)
    assert statuses(manager)['t_x#0'] == status
    assert manager.storage['t_x#0'].metadata['reason'] == reason


def test_a_late_success_of_a_lost_worker_counts_once(medium: Medium):
    manager, run = running(medium)
    hasten(manager, lease=1, spared=1)
    sweep(medium, manager)
    assert run.finish({'n': 1})
    assert statuses(manager)['t_x#0'] == 'finished'
    assert fired(manager) == ['a', 't_x:failed', 't_x']
    assert not run.finish({'n': 1})


def test_a_late_success_of_what_was_replayed_does_not_count(medium: Medium):
    manager, run = running(medium)
    hasten(manager, lease=1, spared=1)
    sweep(medium, manager)
    manager.replay_failed_instance('t_x#0')
    assert not run.finish({'n': 1})
    assert statuses(manager)['t_x#0'] == 'replayed'


# ---------------------------------------------------------------- poison, sharing, outages


def test_what_cannot_be_seen_to_holds_up_nothing_else(medium: Medium, monkeypatch: Any):
    manager = released(medium)
    other = medium.manager(application_of(manager), uid='order:2')
    other.fire('a')
    for session in (manager, other):
        hasten(session)
    real = FakeApplication.makes_claims
    poisoned: list[str] = []

    def poison(self: Any, task_name: str) -> Any:
        if not poisoned:
            poisoned.append(task_name)
            raise RuntimeError('poison')
        return real(self, task_name)

    monkeypatch.setattr(FakeApplication, 'makes_claims', poison)
    report = sweep(medium, manager)
    assert did(report) == {'errors': 1, 'sent': 1}
    assert sweep(medium, manager).taken == 0, 'the poison has a later date'
    assert len(dues(medium, manager)) + len(dues(medium, other)) >= 2


def test_a_pass_ends_when_the_storage_goes_away(medium: Medium, monkeypatch: Any):
    manager = released(medium)
    hasten(manager)

    def down(*_: Any) -> Any:
        raise StorageUnavailable('gone')

    monkeypatch.setattr(medium.storage_class, '_read', down)
    assert did(sweep(medium, manager)) == {'errors': 1}


def test_a_date_that_is_left_over_goes(medium: Medium):
    manager, run = running(medium)
    run.finish(None)
    hasten(manager)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert 't_x#0' not in dues(medium, manager)


# -------------------------------------------------------------------------- retention


def test_a_session_expires_after_its_last_change(medium: Medium):
    manager = medium.manager(PAIR, triggers_session_expires=0.3)
    manager.fire('a')
    first = dues(medium, manager)['']
    manager.fire('a')
    assert dues(medium, manager)[''] >= first
    deadline = time.monotonic() + 20
    while manager.storage.exists:
        assert time.monotonic() < deadline
        report = sweep(medium, manager)
        time.sleep(0.02)
    assert did(report) == {'deleted': 1}
    assert dues(medium, manager) == {}


def test_a_session_in_which_something_is_due_does_not_expire(medium: Medium):
    manager, run = running(medium, triggers_session_expires=0.001)
    assert eventually(lambda: did(sweep(medium, manager))) == {'postponed': 1}
    assert manager.storage.exists
    assert set(dues(medium, manager)) == {'', 't_x#0'}
    assert run.finish(None)


def test_a_session_that_changes_while_it_expires_stays(medium: Medium, monkeypatch: Any):
    manager = medium.manager(PAIR, triggers_session_expires=0.001)
    manager.fire('a')
    class_ = medium.storage_class
    real = class_.delete

    def late(self: Any, version: str | None = None) -> bool:
        monkeypatch.undo()
        manager.fire('b')
        return real(self, version)

    monkeypatch.setattr(class_, 'delete', late)
    assert eventually(lambda: did(sweep(medium, manager))) == {'postponed': 1}
    assert statuses(manager) == {'t_x#0': 'scheduled'}


def test_without_the_setting_sessions_stay_and_old_dates_go(medium: Medium):
    medium.manager(PAIR, triggers_session_expires=0.001).fire('a')
    keeping = medium.manager(PAIR)
    assert eventually(lambda: did(sweep(medium, keeping))) == {'postponed': 1}
    assert keeping.storage.exists
    assert dues(medium, keeping) == {}


def test_messages_of_a_deleted_session_change_nothing(medium: Medium):
    manager, run = running(medium)
    manager.storage.delete()
    manager.fire('a')  # the same uid, begun again
    assert not run.claim()
    assert not run.finish(None)
    assert not run.fail('raised', {})
    assert not run.lose('gone')
    assert not manager.storage.write(run.beat_write())[0]
    assert statuses(manager) == {'t_x#0': 'scheduled'}
    assert fired(manager) == ['a']


def test_a_firing_that_meets_a_deletion_begins_a_session_of_the_applications_own(medium: Medium):
    """Not one with what had been given to the deleted session alone."""
    manager = medium.manager({'t_x': {'after': ['b', 'c'], 'run': 'x'}})
    manager.update_configuration({'t_own': {'after': ['a'], 'run': 'own'}})
    before_commit(manager.storage, lambda: medium.backend().delete())
    firing = manager.fire('a')
    assert firing.heard_by == []
    assert set(manager.storage.tasks) == {'t_x'}


@pytest.mark.parametrize('report', ['skip', 'replay'])
def test_what_a_stale_run_says_of_itself_does_not_resolve_its_failure(medium: Medium, report: str):
    """Skipping and replaying what has failed is for people."""
    manager, run = running(medium)
    hasten(manager, lease=1, spared=1)
    sweep(medium, manager)
    arguments: Any = {'skip': (None,), 'replay': (None, None, 0)}[report]
    assert not getattr(run, report)(*arguments)
    assert statuses(manager)['t_x#0'] == 'failed'


def test_the_loss_of_what_is_over_changes_nothing(medium: Medium):
    manager, run = running(medium)
    run.finish(None)
    assert not run.lose('gone')
    assert statuses(manager)['t_x#0'] == 'finished'
    assert 't_x#0' not in dues(medium, manager)


def test_the_loss_of_a_child_that_had_not_claimed_sends_the_message_again(medium: Medium):
    manager = released(medium)
    confirm(manager)
    assert delivery(manager, 't_x#0').lose('gone')
    assert statuses(manager)['t_x#0'] == 'scheduled'
    assert [release.instance.name for release in application_of(manager).releases] == ['t_x#0'] * 2


def test_a_commit_whose_answer_is_lost_is_no_error_if_the_storage_then_goes_away(
    medium: Medium, monkeypatch: Any
):
    """What was fired is committed, and what it released has a due date."""
    manager = medium.manager(CONFIGURATION)
    lose_answer(manager.storage)
    with pytest.raises(StorageUnavailable) as lost:
        manager.fire('a')
    application = application_of(manager)
    firing = ready(manager, 'a', event_id=lost.value.event_id)
    record = firing.make()
    assert record.released == ['t_x#0']
    assert application.releases == []
    assert set(dues(medium, manager)) == {'t_x#0'}


def test_an_instance_that_was_handed_over_is_not_taken_for_lost(medium: Medium):
    """Its replacement waits in a queue, or runs as a canvas that nobody beats for."""
    manager, run = running(medium, 'again', triggers_max_deliveries=2)
    run.hand_over()
    for number in range(2):
        hasten(manager, lease=1, spared=1)
        before = manager.storage.read(Plan()).now
        assert did(sweep(medium, manager)) == {'postponed': 1}
        left = dues(medium, manager)['t_x#0'] - before
        assert 0 <= left - 3600_000 * 2**number < 60_000, 'longer each time'
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'failed': 1}, 'in the end it is lost'


def test_a_replacement_takes_the_claim_over_and_may_be_lost(medium: Medium):
    manager, run = running(medium)
    run.hand_over()
    replacement = delivery(manager, 't_x#0', 'its own')
    replacement.inherits, replacement.loss = run.token, 'fail'
    assert replacement.claim()
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'failed': 1}


def test_the_result_of_a_replacement_is_found(medium: Medium):
    manager, run = running(medium)
    run.hand_over()
    task_id = manager.storage['t_x#0'].task_id
    application_of(manager).outcomes[task_id] = StoredOutcome('SUCCESS', 5)
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'repaired': 1}


def test_a_child_lost_while_it_handed_over_is_lost(medium: Medium):
    manager, run = running(medium, 'again')
    run.hand_over()
    assert run.lose('gone')
    assert statuses(manager)['t_x#0'] == 'scheduled'


def test_a_message_that_the_broker_refuses_is_offered_later_each_time(medium: Medium):
    manager = released(medium, triggers_dispatch_grace=10, triggers_max_deliveries=2)
    for number in range(2):
        before = manager.storage.read(Plan()).now
        release = application_of(manager).releases[-1]
        assert manager.storage.write(release.refuse_write())[0]
        left = dues(medium, manager)['t_x#0'] - before
        assert 0 <= left - 10_000 * 2**number < 5_000
        hasten(manager)
        did_now = did(sweep(medium, manager))
        assert did_now == ({'sent': 1} if number == 0 else {'failed': 1})


def test_what_kills_worker_after_worker_waits_longer_each_time(medium: Medium):
    manager, _ = running(medium, 'again')
    for number in range(4):
        before = manager.storage.read(Plan()).now
        run = delivery(manager, 't_x#0', f'run-{number}' if number else 'token')
        assert run.lose('gone')
        record = manager.storage['t_x#0'].record
        wait = record.eta - before if record.eta else 0
        assert wait == 0 if not number else 0 <= wait - 1000 * 2**number < 5000
        hasten(manager, eta=0)
        following = delivery(manager, 't_x#0', f'run-{number + 1}')
        following.loss = 'again'
        assert following.claim()


def test_a_failure_that_cannot_print_itself_is_a_failure(medium: Medium):
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError

        __repr__ = __str__

    manager, _ = running(medium)
    outcome = StoredOutcome('FAILURE', with_context(Unprintable(), {'x': Unprintable()}), 10**15)
    application_of(manager).outcomes[manager.storage['t_x#0'].task_id] = outcome
    hasten(manager, lease=1, spared=1)
    assert did(sweep(medium, manager)) == {'repaired': 1}
    exception = manager.storage['t_x#0'].metadata['exception']
    assert exception['message'].startswith('<unprintable ')
    assert exception['context']['x'].startswith('<unprintable ')


def test_a_doubled_message_of_a_replacement_runs_once(medium: Medium):
    """Each delivery has a token of its own, and takes the claim of the one before over."""
    manager, run = running(medium)
    run.hand_over()
    first, second = (delivery(manager, 't_x#0', token) for token in ('first', 'second'))
    for replacement in (first, second):
        replacement.inherits = run.token
    assert first.claim()
    assert not second.claim()
    assert first.claim(), 'its own claim it may repeat'
    assert not second.fail('raised', {})
    assert not run.fail('raised', {}), 'nor has the one that was replaced anything to say'
    assert first.finish(None)
