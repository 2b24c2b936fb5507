"""Gates in a session, on every storage: applied, passed, ended without having run."""

from __future__ import annotations

import json
import secrets
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import InvalidConfiguration, InvalidTransition
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.follow_up import follow_up
from celery_triggers.manager.gate_life import GateEnd, apply_gate, revoke_gate
from celery_triggers.manager.release import header_of
from celery_triggers.testing.conformance.support import (
    application_of,
    before_commit,
    delivery,
    eventually,
    fired,
    lose_answer,
    statuses,
)
from celery_triggers.testing.conformance.test_sweep import did, dues, hasten, sweep
from celery_triggers.testing.media import Medium


def a_gate(**directives: Any) -> Gate:
    options = {name: directives.pop(name) for name in ('delay', 'eta') if name in directives}
    text = json.dumps({'run': 'x', **directives}, sort_keys=True)
    call = {'task': 'x', 'args': [1], 'kwargs': {'a': 2}, 'options': {'queue': 'q'}}
    return Gate(text, call, template='andEvery' in directives, **options)


def apply(
    manager: TriggerManager, name: str = 'g', task_id: str = 'id', **directives: Any
) -> str:
    """Apply a gate as a worker does; return its status."""
    more = {key: directives.pop(key) for key in ('fresh', 'until', 'waits') if key in directives}
    outcome = apply_gate(manager, name, task_id, a_gate(**directives), **more)
    follow_up(manager, outcome)
    return str(outcome.value)


def known(medium: Medium, manager: TriggerManager, *task_ids: str) -> dict[str, Any]:
    return medium.storage_class.gates(medium.url, manager.storage.settings, task_ids)


def ending(manager: TriggerManager, name: str = 'g#0', token: str = 'end') -> GateEnd:
    instance = manager.storage[name]
    incarnation = manager.storage.load().head.incarnation
    return GateEnd(manager, header_of(manager, instance, incarnation), token)


def endings(manager: TriggerManager) -> list[str]:
    return [r.instance.name for r in application_of(manager).releases if r.ends]


class TestApplying:
    def test_it_waits_and_is_released_under_its_own_task_id(self, medium: Medium):
        manager = medium.manager()
        assert apply(manager, after=['a', 'b']) == 'unstarted'
        assert application_of(manager).releases == []
        manager.fire('b', {'n': 1})
        assert statuses(manager) == {'g#0': 'unstarted'}
        firing = manager.fire('a')
        assert (firing.heard_by, firing.released) == (['g'], ['g#0'])
        [release] = application_of(manager).releases
        assert (release.instance.task_id, release.header['task_id']) == ('id', 'id')
        assert release.instance.kwargs == {'a': {}, 'b': {'n': 1}}
        assert release.instance.record.gate == a_gate(after=['a', 'b'])
        assert release.header['gate'] is True

    def test_its_end_cascades(self, medium: Medium):
        manager = medium.manager({'t_next': {'run': 'next', 'after': ['g']}})
        apply(manager, after=['a'])
        manager.fire('a')
        mine = delivery(manager, 'g#0')
        assert mine.claim()
        assert mine.finish({'n': 3})
        assert statuses(manager) == {'g#0': 'finished', 't_next#0': 'scheduled'}
        assert manager.storage['t_next#0'].kwargs == {'g': {'n': 3}}

    def test_it_waits_for_the_end_of_another_gate(self, medium: Medium):
        manager = medium.manager()
        apply(manager, 'second', 'id2', after=['first:abandoned'])
        apply(manager, 'first', 'id1', after=['a'], unless=['no'])
        assert manager.fire('no').released == ['second#0']
        assert fired(manager) == ['no', 'first:abandoned']

    def test_applied_again_it_does_nothing(self, medium: Medium):
        manager = medium.manager()
        assert apply(manager, after=['a']) == 'unstarted'
        assert apply(manager, after=['a']) == 'None'
        assert statuses(manager) == {'g#0': 'unstarted'}
        manager.fire('a')
        delivery(manager, 'g#0').claim()
        delivery(manager, 'g#0').finish(None)
        before = len(application_of(manager).releases)
        assert apply(manager, after=['a']) == 'None'
        assert statuses(manager) == {'g#0': 'finished'}
        assert len(application_of(manager).releases) == before

    def test_two_workers_that_apply_it_at_once_apply_it_once(self, medium: Medium):
        manager = medium.manager()
        before_commit(manager.storage, lambda: apply(medium.manager(application_of(manager)),
                                                     after=['a']))
        apply(manager, after=['a'])
        assert statuses(manager) == {'g#0': 'unstarted'}
        assert manager.fire('a').released == ['g#0']

    def test_an_answer_that_was_lost_is_found(self, medium: Medium):
        manager = medium.manager()
        manager.fire('a')
        lose_answer(manager.storage)
        with pytest.raises(Exception, match='lost'):
            apply(manager, after=['a'])
        apply(manager, after=['a'])
        assert statuses(manager) == {'g#0': 'scheduled'}
        assert set(dues(medium, manager)) == {'g#0'}

    def test_a_firing_between_its_decision_and_its_commit_reaches_it(self, medium: Medium):
        manager = medium.manager()
        other = medium.manager(application_of(manager))
        before_commit(manager.storage, lambda: other.fire('a', {'n': 1}))
        assert apply(manager, after=['a']) == 'scheduled'
        assert manager.storage['g#0'].kwargs == {'a': {'n': 1}}

    def test_without_a_condition_it_is_released_at_once(self, medium: Medium):
        manager = medium.manager()
        assert apply(manager) == 'scheduled'
        assert application_of(manager).released == ['g#0']

    def test_gates_of_one_name_have_numbers(self, medium: Medium):
        manager = medium.manager()
        for number in range(3):
            apply(manager, 'g', f'id{number}', after=['a'])
        assert manager.fire('a').released == ['g#0', 'g#1', 'g#2']
        assert [i.task_id for i in manager.storage] == ['id0', 'id1', 'id2']

    def test_the_name_of_a_trigger_task_is_refused(self, medium: Medium):
        manager = medium.manager({'g': {'run': 'x', 'after': ['a']}})
        with pytest.raises(InvalidConfiguration, match='give the gate another'):
            apply(manager, after=['a'])
        assert not manager.storage.exists

    def test_its_task_id_is_known_while_it_waits(self, medium: Medium):
        manager = medium.manager()
        odd = 'id+|%\n ü'
        apply(manager, 'g', odd, after=['a'])
        apply(manager, 'h', 'id2', after=['b'])
        both = {odd: ('order:1', 'g#0'), 'id2': ('order:1', 'h#0')}
        assert known(medium, manager, odd, 'id2', 'id3') == both
        manager.fire('a')
        assert known(medium, manager, odd, 'id2') == {'id2': ('order:1', 'h#0')}
        manager.storage.delete()
        assert known(medium, manager, odd, 'id2') == {}

    def test_a_deleted_session_takes_the_ids_of_its_gates_along(self, medium: Medium):
        manager = medium.manager()
        odd = 'id+|%\n ü'
        apply(manager, 'g', odd, after=['a'])
        manager.storage.delete()
        assert known(medium, manager, odd) == {}

    def test_somebody_is_told_that_it_waits_and_only_then(self, medium: Medium):
        manager = medium.manager()
        told: list[str] = []
        apply(manager, 'g', 'id1', after=['a'], waits=told.append)
        manager.fire('a')
        apply(manager, 'h', 'id2', after=['a'], waits=told.append)
        assert told == ['g#0']

    def test_it_begins_no_deadlines(self, medium: Medium):
        manager = medium.manager({'t_x': {'run': 'x', 'after': ['a'], 'within': 60}})
        apply(manager, after=['b'])
        assert statuses(manager) == {'g#0': 'unstarted'}


class TestConditions:
    def test_what_was_fired_before_counts(self, medium: Medium):
        manager = medium.manager()
        manager.fire('a', {'n': 1})
        manager.fire('a', {'n': 2})
        assert apply(manager, after=['a']) == 'scheduled'
        assert manager.storage['g#0'].kwargs == {'a': {'n': 2}}

    def test_fresh_it_does_not(self, medium: Medium):
        manager = medium.manager()
        manager.fire('a', {'n': 1})
        assert apply(manager, after=['a'], fresh=True) == 'unstarted'
        manager.fire('a', {'n': 2})
        assert manager.storage['g#0'].kwargs == {'a': {'n': 2}}

    def test_what_forbids_it_may_have_come_before(self, medium: Medium):
        manager = medium.manager()
        manager.fire('no')
        assert apply(manager, after=['a'], unless=['no']) == 'abandoned'
        assert endings(manager) == ['g#0']

    @pytest.mark.parametrize('fresh', [False, True])
    def test_counted_firings(self, medium: Medium, fresh: bool):
        manager = medium.manager()
        manager.fire('a')
        apply(manager, after=[{'trigger': 'a', 'times': 3}], fresh=fresh)
        manager.fire('a')
        assert statuses(manager) == {'g#0': 'unstarted'}
        released = manager.fire('a').released
        assert released == ([] if fresh else ['g#0'])
        if fresh:
            assert manager.fire('a').released == ['g#0']

    def test_filters_look_at_the_history_and_at_what_comes(self, medium: Medium):
        pytest.importorskip('cel_expr_python')
        manager = medium.manager()
        for n in (1, 5, 2):
            manager.fire('a', {'n': n})
        big = {'trigger': 'a', 'where': 'n > 3'}
        assert apply(manager, 'one', 'id1', after=[big]) == 'scheduled'
        assert manager.storage['one#0'].kwargs == {'a': {'n': 5}}
        twice = {**big, 'times': 2}
        assert apply(manager, 'two', 'id2', after=[twice]) == 'unstarted'
        assert manager.fire('a', {'n': 3}).released == []
        assert manager.fire('a', {'n': 9}).released == ['two#0']

    def test_a_filter_goes_on_counting_for_a_gate_that_is_not_there_yet(self, medium: Medium):
        pytest.importorskip('cel_expr_python')
        manager = medium.manager()
        where = {'trigger': 'a', 'where': 'n > 3', 'times': 3}
        apply(manager, 'one', 'id1', after=[where])
        manager.fire('a', {'n': 4})
        apply(manager, 'two', 'id2', after=[where])
        manager.fire('a', {'n': 4})
        assert manager.fire('a', {'n': 4}).released == ['one#0', 'two#0']

    def test_a_countdown_counts_from_the_release(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], delay=3600_000)
        firing = manager.fire('a')
        eta = manager.storage['g#0'].record.eta
        assert eta == round(firing.at.timestamp() * 1000) + 3600_000
        assert application_of(manager).releases == []
        assert dues(medium, manager) == {'g#0': eta}

    def test_an_eta_that_is_over_does_not_matter(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], eta=1)
        manager.fire('a')
        assert application_of(manager).released == ['g#0']

    def test_it_expires(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], within=0.05)
        assert eventually(lambda: did(sweep(medium, manager))) == {'expired': 1}
        assert fired(manager) == ['g:expired']
        assert endings(manager) == ['g#0']
        record = manager.storage['g#0'].record
        assert (record.metadata['reason'], record.metadata['missing']) == ('deadline', ['a'])

    def test_it_expires_at_a_date(self, medium: Medium):
        manager = medium.manager()
        at = int((datetime.now(timezone.utc) + timedelta(hours=1)).timestamp() * 1000)
        apply(manager, after=['a'], until=at)
        assert dues(medium, manager) == {'g#0': at}
        assert apply(manager, 'h', 'id2', after=['a'], until=1) == 'abandoned'
        assert statuses(manager)['h#0'] == 'abandoned'

    def test_its_condition_is_no_matter_of_the_sessions_configuration(self, medium: Medium):
        manager = medium.manager({'t_x': {'run': 'x', 'after': ['a']}})
        apply(manager, after=['a', 'b'])
        manager.update_configuration({'t_x': {'run': 'x', 'after': ['c']}}, apply_past=True)
        manager.remove_tasks(['t_x'])
        manager.fire('a')
        assert manager.fire('b').released == ['g#0']


class TestCopies:
    """Of a gate with ``andEvery``."""

    def test_each_firing_makes_one(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], andEvery='d')
        manager.fire('d', {'n': 1})
        manager.fire('d', {'n': 2})
        assert manager.fire('a').released == ['g#1', 'g#2']
        assert manager.fire('d', {'n': 3}).released == ['g#3']
        found = manager.storage.instances
        assert [found[f'g#{n}'].kwargs['d'] for n in (1, 2, 3)] == [{'n': 1}, {'n': 2}, {'n': 3}]
        ids = {found[f'g#{n}'].task_id for n in range(4)}
        assert len(ids) == 4
        assert str(found['g#0'].status) == 'unstarted'

    def test_what_forbids_it_ends_it_with_its_copies(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], andEvery='d', unless=['no'])
        manager.fire('d')
        manager.fire('no')
        assert statuses(manager) == {'g#0': 'abandoned', 'g#1': 'abandoned'}
        assert sorted(endings(manager)) == ['g#0', 'g#1']
        assert manager.fire('d').created == []

    def test_a_copy_has_the_latest_of_the_others(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'], andEvery='d')
        manager.fire('a', {'n': 1})
        manager.fire('a', {'n': 2})
        manager.fire('d')
        assert manager.storage['g#1'].kwargs == {'a': {'n': 2}, 'd': {}}


class TestFinalizing:
    CONFIGURATION = {'t_x': {'run': 'x', 'after': ['a']}}

    def finish(self, manager: TriggerManager, name: str) -> None:
        mine = delivery(manager, name)
        assert mine.claim()
        assert mine.finish(None)

    def test_a_gate_that_waits_holds_it_up(self, medium: Medium):
        manager = medium.manager(self.CONFIGURATION, finalizing=True)
        apply(manager, after=['b'])
        manager.fire('a')
        self.finish(manager, 't_x#0')
        assert 'sessionFinalized' not in fired(manager)
        manager.fire('b')
        self.finish(manager, 'g#0')
        assert fired(manager)[-1] == 'sessionFinalized'

    def test_one_that_waits_for_it_does_not(self, medium: Medium):
        manager = medium.manager(self.CONFIGURATION, finalizing=True)
        apply(manager, after=['sessionFinalized'])
        manager.fire('a')
        self.finish(manager, 't_x#0')
        assert fired(manager)[-1] == 'sessionFinalized'
        assert statuses(manager)['g#0'] == 'scheduled'

    def test_neither_does_one_that_only_makes_copies(self, medium: Medium):
        manager = medium.manager(self.CONFIGURATION, finalizing=True)
        apply(manager, andEvery='d')
        manager.fire('a')
        manager.fire('d')
        self.finish(manager, 't_x#0')
        assert 'sessionFinalized' not in fired(manager)
        self.finish(manager, 'g#1')
        assert fired(manager)[-1] == 'sessionFinalized'

    def test_its_abandonment_may_be_what_finalizes(self, medium: Medium):
        manager = medium.manager(self.CONFIGURATION, finalizing=True)
        apply(manager, after=['b'], unless=['no'])
        manager.fire('a')
        self.finish(manager, 't_x#0')
        manager.fire('no')
        assert fired(manager)[-2:] == ['g:abandoned', 'sessionFinalized']


class TestEnding:
    """A gate that ends without having run: whoever waits for its result is told once."""

    def abandoned(self, medium: Medium, **settings: Any) -> TriggerManager:
        manager = medium.manager({}, **settings)
        apply(manager, after=['a'], unless=['no'])
        manager.fire('no')
        return manager

    def test_it_is_told_once(self, medium: Medium):
        manager = self.abandoned(medium)
        assert endings(manager) == ['g#0']
        assert set(dues(medium, manager)) == {'g#0'}
        first, second = ending(manager, token='one'), ending(manager, token='two')
        assert first.claim()
        assert not second.claim()
        first.done()
        assert not second.claim()
        assert not ending(manager, token='one').claim()
        assert dues(medium, manager) == {}
        assert statuses(manager) == {'g#0': 'abandoned'}

    def test_whoever_gives_it_up_leaves_it_to_others(self, medium: Medium):
        manager = self.abandoned(medium)
        assert ending(manager, token='one').claim()
        ending(manager, token='two').give_up()
        assert not ending(manager, token='two').claim()
        ending(manager, token='one').give_up()
        assert ending(manager, token='two').claim()

    def test_a_message_that_was_lost_is_sent_again(self, medium: Medium):
        manager = self.abandoned(medium, triggers_dispatch_grace=0.1)
        assert eventually(lambda: did(sweep(medium, manager))) == {'sent': 1}
        assert endings(manager) == ['g#0', 'g#0']

    def test_a_confirmation_puts_it_off(self, medium: Medium):
        manager = self.abandoned(medium, triggers_dispatch_grace=0.1)
        [release] = application_of(manager).releases
        assert manager.storage.write(release.confirm_write())[0]
        assert dues(medium, manager)['g#0'] > manager.storage.read(Plan()).now + 3000_000
        assert not manager.storage.write(release.confirm_write())[0]

    def test_one_that_died_while_it_told_is_replaced(self, medium: Medium):
        manager = self.abandoned(medium, triggers_lease=1, triggers_dispatch_grace=0.1)
        assert ending(manager).claim()
        manager.storage.write(
            ending(manager)._write('end', {'lease': 0}, 1)  # its lease is over
        )
        eventually(lambda: sweep(medium, manager) and endings(manager)[1:])
        assert ending(manager, token='other').claim()

    @pytest.mark.parametrize(
        ('end', 'status', 'trigger'),
        [
            (lambda m: revoke_gate(m, 'g#0', 'id'), 'revoked', 'g:revoked'),
            (lambda m: m.cancel('why'), 'abandoned', 'g:abandoned'),
            (lambda m: m.update_instance_status('g#0', 'abandoned'), 'abandoned', 'g:abandoned'),
            (lambda m: m.update_instance_status('g#0', 'revoked'), 'revoked', 'g:revoked'),
            (lambda m: m.update_instance_status('g#0', 'skipped'), 'skipped', None),
        ],
    )
    def test_every_end_without_a_run_is_told(
        self, medium: Medium, end: Any, status: str, trigger: str | None
    ):
        manager = medium.manager()
        apply(manager, after=['a'])
        end(manager)
        assert statuses(manager) == {'g#0': status}
        assert fired(manager) == ([trigger] if trigger else [])
        assert endings(manager) == ['g#0']
        assert known(medium, manager, 'id') == {}
        assert ending(manager).claim()
        assert manager.fire('a').released == []

    def test_one_that_cannot_be_sent_is_told(self, medium: Medium):
        manager = medium.manager()
        apply(manager)
        assert delivery(manager, 'g#0', '').fail('cannot be dispatched', {}, untold=True)
        assert endings(manager) == ['g#0']

    def test_what_celery_knows_of_is_not_told(self, medium: Medium):
        manager = medium.manager()
        apply(manager)
        mine = delivery(manager, 'g#0')
        mine.claim()
        mine.fail('raised', {})
        assert endings(manager) == []
        assert dues(medium, manager) == {}

    @pytest.mark.parametrize('chord', [None, {'task': 'body'}])
    def test_a_stored_result_alone_does_not_say_that_its_chord_knows(
        self, medium: Medium, chord: Any
    ):
        """Celery stores it first: the worker may have died between the two."""
        manager = medium.manager({}, triggers_lease=1)
        gate = a_gate()
        gate.call['options']['chord'] = chord
        follow_up(manager, apply_gate(manager, 'g', 'id', gate))
        mine = delivery(manager, 'g#0')
        assert mine.claim()
        assert mine.finish({'n': 1}, untold=True)
        assert statuses(manager) == {'g#0': 'finished'}
        assert fired(manager) == ['g']
        assert endings(manager) == []
        assert set(dues(medium, manager)) == ({'g#0'} if chord else set())
        if chord:
            hasten(manager, 'g#0')
            assert did(sweep(medium, manager)) == {'sent': 1}
            assert endings(manager) == ['g#0']

    def test_one_that_waits_no_longer_is_not_revoked(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        assert not revoke_gate(manager, 'g#0', 'other id')
        manager.fire('a')
        assert not revoke_gate(manager, 'g#0', 'id')
        assert not revoke_gate(manager, 'g#7', 'id')
        assert statuses(manager) == {'g#0': 'scheduled'}

    def test_a_firing_and_a_revocation_at_once_end_it_one_way(self, shared_medium: Medium):
        for _ in range(10):
            uid = secrets.token_hex(4)
            managers = [shared_medium.manager({}, uid=uid) for _ in range(2)]
            apply(managers[0], after=['a'])
            threads = [
                threading.Thread(target=managers[0].fire, args=('a',)),
                threading.Thread(target=revoke_gate, args=(managers[1], 'g#0', 'id')),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            sent = [r for m in managers for r in application_of(m).releases]
            assert [r.ends for r in sent] == [statuses(managers[0]) == {'g#0': 'revoked'}]

    def test_replayed_it_has_its_id_its_message_and_no_end(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        revoke_gate(manager, 'g#0', 'id')
        new = manager.replay_failed_instance('g#0')
        assert (new.name, new.task_id, new.record.gate) == ('g#1', 'id', a_gate(after=['a']))
        assert not ending(manager).claim()
        assert set(dues(medium, manager)) == {'g#1'}
        assert known(medium, manager, 'id') == {}

    def test_a_clone_is_refused(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        with pytest.raises(InvalidConfiguration):
            manager.clone_instance('g#0')

    def test_a_running_one_is_not_told_by_hand_twice(self, medium: Medium):
        manager = medium.manager()
        apply(manager)
        mine = delivery(manager, 'g#0')
        mine.claim()
        manager.update_instance_status('g#0', 'failed')
        assert manager.storage['g#0'].record.loss == ENDING
        assert not mine.fail('raised', {})
        with pytest.raises(InvalidTransition):
            manager.update_instance_status('g#0', 'failed')


def test_they_are_explained(medium: Medium):
    manager = medium.manager({'t_x': {'run': 'x', 'after': ['a']}})
    apply(manager, 'g', 'id1', after=['a', 'b'])
    apply(manager, 'every', 'id2', andEvery='d')
    manager.fire('a')
    assert [str(e) for e in manager.explain('g')] == [
        'g#0 is unstarted: it has a and waits for b'
    ]
    assert [str(e) for e in manager.explain('every')] == [
        'every#0 is unstarted: each firing of d makes a copy of it'
    ]
    assert [e.task for e in manager.explain()] == ['every', 'g', 't_x']
    with pytest.raises(InvalidConfiguration, match='it has: every, g, t_x'):
        manager.explain('h')


def test_an_end_that_nobody_takes_is_given_up(medium: Medium, caplog: Any):
    manager = medium.manager({}, triggers_dispatch_grace=0.1, triggers_max_deliveries=1)
    apply(manager, after=['a'], unless=['no'])
    manager.fire('no')
    [release] = application_of(manager).releases
    manager.storage.write(release.refuse_write())
    assert eventually(lambda: did(sweep(medium, manager))) == {'failed': 1}
    assert dues(medium, manager) == {}
    assert 'could not be told' in caplog.text


class TestWaiting:
    REFRESHED: dict[str, Any] = {'result_backend': 'redis://', 'result_expires': 0.4}

    def test_the_state_of_its_result_is_stored_again(self, medium: Medium):
        manager = medium.manager({}, **self.REFRESHED)
        shown = application_of(manager).shown
        apply(manager, after=['a'], within=3600)
        for number in (1, 2):
            at, now = dues(medium, manager)['g#0'], manager.storage.read(Plan()).now
            assert at <= now + 500
            hasten(manager, 'g#0')
            assert did(sweep(medium, manager)) == {'postponed': 1}
            assert shown == [('id', 'order:1', 'g#0')] * number
        assert statuses(manager) == {'g#0': 'unstarted'}
        assert set(dues(medium, manager)) == {'g#0'}

    def test_its_deadline_comes_all_the_same(self, medium: Medium):
        manager = medium.manager({}, **self.REFRESHED)
        apply(manager, after=['a'], within=0.3)
        hasten(manager, 'g#0')
        # Postponed, unless that has taken so long.
        report = did(sweep(medium, manager))
        assert 'expired' in report or eventually(lambda: did(sweep(medium, manager)))
        assert statuses(manager) == {'g#0': 'abandoned'}

    def test_one_whose_result_is_ignored_is_left_alone(self, medium: Medium):
        manager = medium.manager({}, **self.REFRESHED)
        gate = a_gate(after=['a'])
        gate.call['options']['ignore_result'] = True
        follow_up(manager, apply_gate(manager, 'g', 'id', gate))
        assert dues(medium, manager) == {}

    def test_without_an_end_of_results_it_has_no_date(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        assert dues(medium, manager) == {}

    def test_a_session_with_one_does_not_expire(self, medium: Medium):
        manager = medium.manager({}, triggers_session_expires=0.001)
        apply(manager, after=['a'])
        assert eventually(lambda: did(sweep(medium, manager))) == {'postponed': 1}
        assert manager.storage.exists


class TestCosts:
    def test_a_firing_that_releases_one_takes_two_questions(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        asked = count_questions(manager)
        assert manager.fire('a').released == ['g#0']
        assert asked == {'read': 1, 'commit': 1}

    def test_applying_one_takes_two(self, medium: Medium):
        manager = medium.manager()
        manager.fire('other')
        asked = count_questions(manager)
        apply(manager, after=['a'])
        assert asked == {'read': 1, 'commit': 1}

    def test_a_firing_that_nobody_hears_takes_two_among_gates(self, medium: Medium):
        manager = medium.manager()
        apply(manager, after=['a'])
        asked = count_questions(manager)
        manager.fire('z')
        assert asked == {'read': 1, 'commit': 1}


def count_questions(manager: TriggerManager) -> dict[str, int]:
    asked = {'read': 0, 'commit': 0}
    storage: Any = manager.storage
    for what in asked:
        real = getattr(storage, f'_{what}')

        def counted(*args: Any, what: str = what, real: Any = real) -> Any:
            asked[what] += 1
            return real(*args)

        setattr(storage, f'_{what}', counted)
    return asked
