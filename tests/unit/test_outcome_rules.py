"""How instances end, what that fires, and what a person can do about it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from celery_triggers import Status
from celery_triggers.engine.transitions import RESOLVED, TRANSITIONS, Event
from celery_triggers.exceptions import (
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
    UnknownInstance,
    with_context,
)
from celery_triggers.manager.facts import exception_facts


@pytest.mark.parametrize(
    ('result', 'kwargs'),
    [
        ({'n': 1}, {'n': 1}),
        (None, {}),
        (7, {'result': 7}),
        ([1, 2], {'result': [1, 2]}),
        ('text', {'result': 'text'}),
    ],
)
def test_a_result_cascades(world: Any, result: Any, kwargs: dict[str, Any]) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x']}})
    world.fire('a')
    world.finish('t_x#0', result)
    assert world.released == ['t_x#0', 't_y#0']
    assert world.kwargs('t_y#0') == {'t_x': kwargs}
    assert world.storage()['t_x#0'].result == result


def test_a_failure_is_kept_and_fires_its_outcome(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x:failed']}})
    world.fire('a')
    try:
        raise with_context(ValueError('no'), {'order': 42})
    except ValueError as exc:
        world.fail('t_x#0', exc)
    instance = world.storage()['t_x#0']
    assert instance.status is Status.FAILED
    assert instance.metadata['exception']['type'] == 'ValueError'
    assert instance.metadata['exception']['message'] == 'no'
    assert 'Traceback' in instance.metadata['exception']['traceback']
    assert instance.metadata['exception']['context'] == {'order': 42}
    assert world.kwargs('t_y#0')['t_x:failed']['reason'] == 'raised'


def test_a_revocation_fires_its_outcome(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x:revoked']}})
    world.fire('a')
    assert world.delivery('t_x#0').revoke('revoked')
    assert world.statuses() == {'t_x#0': 'revoked', 't_y#0': 'scheduled'}


def test_an_instance_is_claimed_once(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    assert world.delivery('t_x#0', 'one').claim()
    assert world.delivery('t_x#0', 'one').claim(), "repeating one's own claim is harmless"
    assert not world.delivery('t_x#0', 'two').claim()


def test_only_the_claim_that_runs_can_fail_an_instance(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.delivery('t_x#0', 'one').claim()
    assert not world.delivery('t_x#0', 'two').fail('raised', exception_facts(ValueError()))
    assert world.statuses() == {'t_x#0': 'running'}


def test_a_success_without_the_token_counts_while_the_instance_is_unresolved(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.delivery('t_x#0', 'one').claim()
    assert world.delivery('t_x#0', 'two').finish(None)
    assert not world.delivery('t_x#0', 'one').finish(None), 'one outcome'
    assert world.fired() == ['a', 't_x']


def test_a_late_success_counts_only_after_a_lost_worker_or_a_time_limit(world: Any) -> None:
    world.configure({'t_x': {'andEvery': 'a'}, 't_y': {'andEvery': 't_x'}})
    for reason in ('worker lost', 'time limit', 'raised'):
        name = world.fire('a').released[0]
        delivery = world.delivery(name)
        assert delivery.claim()
        assert delivery.fail(reason, exception_facts(None))
        assert delivery.finish({'late': reason}) is (reason != 'raised')
    assert [r.kwargs for r in world.storage().history if r.trigger == 't_x'] == [
        {'late': 'worker lost'}, {'late': 'time limit'},
    ]


def test_a_retry_keeps_the_instance_and_makes_an_attempt(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    delivery = world.delivery('t_x#0')
    delivery.claim()
    assert delivery.retry(0)
    assert world.storage()['t_x#0'].attempt == 1
    assert not delivery.claim(), 'the message of attempt 0 runs nothing any more'
    assert not delivery.fail('raised', exception_facts(None))
    again = world.delivery('t_x#0')
    again.header = {**again.header, 'attempt': 1}
    assert again.claim()
    assert again.finish(None)


def test_requeue_gives_the_attempt_back(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.delivery('t_x#0', 'one').claim()
    assert world.delivery('t_x#0', 'one').requeue()
    assert world.statuses() == {'t_x#0': 'scheduled'}
    assert world.delivery('t_x#0', 'two').claim()


def test_a_message_of_another_incarnation_does_nothing(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    old = world.delivery('t_x#0')
    world.storage().delete()
    world.fire('a')
    assert not old.claim()
    assert not old.finish(None)
    assert world.statuses() == {'t_x#0': 'scheduled'}


def test_a_failed_instance_is_replayed_with_other_kwargs(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b'], 'unless': ['c']}})
    world.fire('a', {'n': 1})
    world.fire('b', {'n': 1})
    world.fail('t_x#0')
    world.fire('c')
    new = world.manager().replay_failed_instance('t_x#0', {'a': {'n': 2}})
    assert world.statuses() == {'t_x#0': 'replayed', 't_x#1': 'scheduled'}, '"unless" is not asked'
    assert (new.name, new.depth, new.metadata['parent']) == ('t_x#1', 1, 't_x#0')
    assert new.kwargs == {'a': {'n': 2}, 'b': {'n': 1}}
    assert world.released == ['t_x#0', 't_x#1']


def test_a_replay_runs_what_the_configuration_says_now(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.fail('t_x#0')
    world.manager().update_configuration({'t_x': {'after': ['a'], 'run': 'better'}})
    new = world.manager().replay_failed_instance(world.storage()['t_x#0'])
    assert new.config is not None
    assert new.config.run == 'better'


def test_a_revoked_instance_can_be_replayed(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.delivery('t_x#0').revoke('revoked')
    world.manager().replay_failed_instance('t_x#0')
    assert world.finish('t_x#1')


@pytest.mark.parametrize('cascade', [True, False])
def test_a_failed_instance_is_skipped_with_a_simulated_result(world: Any, cascade: bool) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x']}})
    world.fire('a')
    world.fail('t_x#0')
    world.manager().skip_failed_instance('t_x#0', cascade=cascade, result={'n': 7})
    assert world.statuses()['t_x#0'] == 'skipped'
    if cascade:
        assert world.kwargs('t_y#0') == {'t_x': {'n': 7}}
    else:
        assert 't_y#0' not in world.storage()


@pytest.mark.parametrize('status', ['unstarted', 'scheduled', 'running', 'finished'])
def test_only_failed_and_revoked_instances_are_replayed_or_skipped_by_hand(
    world: Any, status: str
) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a')
    if status != 'unstarted':
        world.fire('b')
    if status in ('running', 'finished'):
        world.delivery('t_x#0').claim()
    if status == 'finished':
        world.delivery('t_x#0').finish(None)
    before = world.storage().debug_repr()
    with pytest.raises(InvalidTransition, match=status):
        world.manager().replay_failed_instance('t_x#0')
    with pytest.raises(InvalidTransition, match=status):
        world.manager().skip_failed_instance('t_x#0')
    assert world.storage().debug_repr() == before


@pytest.mark.parametrize('name', ['t_x#0', 'nonsense', 't_x#', '#0', 't_x#-1'])
def test_an_unknown_instance_is_refused(world: Any, name: str) -> None:
    world.configure({'t_x': {'after': ['a']}})
    manager = world.manager()
    for call in (
        manager.replay_failed_instance,
        manager.skip_failed_instance,
        manager.mark_instance_logs_resolved,
        lambda n: manager.update_instance_status(n, 'skipped'),
        lambda n: manager.update_instance_metadata(n, {}),
    ):
        with pytest.raises(UnknownInstance):
            call(name)
    assert not world.storage().exists


@pytest.mark.parametrize('status', sorted(RESOLVED))
def test_any_resolved_status_can_be_set_on_an_unresolved_instance(
    world: Any, status: Status
) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x']}})
    world.fire('a')
    world.manager().update_instance_status(
        't_x#0', status, metadata={'by': 'ann'}, cascade=True, cascade_kwargs={'n': 3}
    )
    instance = world.storage()['t_x#0']
    assert (instance.status, instance.metadata['by']) == (status, 'ann')
    assert world.kwargs('t_y#0') == {'t_x': {'n': 3}}
    with pytest.raises(InvalidTransition):
        world.manager().update_instance_status('t_x#0', 'skipped')


@pytest.mark.parametrize('status', ['scheduled', 'running', 'unstarted'])
def test_no_unresolved_status_but_an_outcome_is_set_by_hand(world: Any, status: str) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    with pytest.raises(InvalidTransition):
        world.manager().update_instance_status('t_x#0', status)
    world.manager().update_instance_status('t_x#0', 'failed')
    assert world.fired() == ['a', 't_x:failed']


def test_an_unknown_status_is_refused(world: Any) -> None:
    with pytest.raises(ValueError, match='nonsense'):
        world.manager().update_instance_status('t_x#0', 'nonsense')


def test_metadata_is_merged_and_must_be_serializable(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    world.manager().update_instance_metadata('t_x#0', {'a': 1})
    world.manager().update_instance_metadata('t_x#0', {'b': 2})
    assert world.storage()['t_x#0'].metadata == {'a': 1, 'b': 2}
    with pytest.raises(InvalidFiring):
        world.manager().update_instance_metadata('t_x#0', {'c': object()})


def test_every_status_change_leaves_a_timestamp_in_utc(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a')
    world.fire('b')
    world.finish('t_x#0')
    times = world.storage()['t_x#0'].timestamps
    assert list(times) == ['unstarted', 'scheduled', 'running', 'finished']
    assert all(time.utcoffset().total_seconds() == 0 for time in times.values())
    assert list(times.values()) == sorted(times.values())


def test_unresolved_tasks_and_instances(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['b']}, 't_z': {'after': ['a']}})
    world.fire('a')
    world.finish('t_x#0')
    world.fail('t_z#0')
    manager = world.manager()
    assert [t.name for t in manager.get_unresolved_tasks()] == ['t_y', 't_z']
    assert [i.name for i in manager.get_unresolved_instances()] == ['t_z#0']


def test_the_table_has_no_step_out_of_a_resolved_status() -> None:
    for steps in TRANSITIONS.values():
        assert RESOLVED.isdisjoint(steps)
    assert set(TRANSITIONS) == set(Event)


# ------------------------------------------------------------------ finalizing


def test_session_finalized_is_fired_in_the_step_that_settled_the_session(
    finalizing: Any,
) -> None:
    finalizing.configure({
        't_x': {'after': ['a']},
        't_end': {'after': ['sessionFinalized']},
        't_follower': {'after': ['t_end']},
        't_sorry': {'after': ['t_x:failed']},
    })
    finalizing.fire('a')
    finalizing.finish('t_x#0')
    assert finalizing.released == ['t_x#0', 't_end#0']
    finalizing.finish('t_end#0')
    finalizing.finish('t_follower#0')
    assert finalizing.fired() == ['a', 't_x', 'sessionFinalized', 't_end', 't_follower']


def test_a_failed_instance_and_its_running_follower_hold_the_finalization_up(
    finalizing: Any,
) -> None:
    finalizing.configure({'t_x': {'after': ['a']}, 't_sorry': {'after': ['t_x:failed']}})
    finalizing.fire('a')
    finalizing.fail('t_x#0')
    finalizing.manager().skip_failed_instance('t_x#0')
    assert 'sessionFinalized' not in finalizing.fired()
    finalizing.finish('t_sorry#0')
    assert finalizing.fired().count('sessionFinalized') == 1


def test_a_task_that_is_still_to_come_holds_the_finalization_up(finalizing: Any) -> None:
    finalizing.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['b']}})
    finalizing.fire('a')
    finalizing.finish('t_x#0')
    assert 'sessionFinalized' not in finalizing.fired()
    finalizing.fire('b')
    finalizing.finish('t_y#0')
    assert 'sessionFinalized' in finalizing.fired()


def test_what_waits_for_the_finalization_does_not_hold_it_up(finalizing: Any) -> None:
    finalizing.configure({'t_x': {'after': ['a']}, 't_end': {'after': ['a', 'sessionFinalized']}})
    finalizing.fire('a')
    finalizing.finish('t_x#0')
    assert finalizing.statuses()['t_end#0'] == 'scheduled'


def test_abandonment_settles_a_session(finalizing: Any) -> None:
    finalizing.configure({'t_x': {'after': ['a'], 'unless': ['c']}})
    finalizing.fire('c')
    assert finalizing.fired() == ['c', 't_x:abandoned', 'sessionFinalized']


def test_a_session_into_which_nothing_was_fired_is_not_finalized(finalizing: Any) -> None:
    finalizing.manager().start()
    assert finalizing.storage().exists
    finalizing.manager().update_configuration({})
    assert finalizing.fired() == []


def test_session_finalized_is_not_fired_by_hand(finalizing: Any) -> None:
    with pytest.raises(InvalidFiring, match='finalizing manager'):
        finalizing.fire('sessionFinalized')


def test_the_session_keeps_its_manager(finalizing: Any) -> None:
    finalizing.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['b']}})
    finalizing.fire('a')
    finalizing.finish('t_x#0')
    finalizing.manager_key = 'default'
    finalizing.fire('b')
    finalizing.finish('t_y#0')
    assert finalizing.fired()[-1] == 'sessionFinalized'


def test_finalized_exactly_once_under_eight_threads(finalizing: Any) -> None:
    finalizing.configure({
        **{f't_{n}': {'after': [f'a{n}']} for n in range(8)},
        't_sorry': {'after': ['t_0:failed']},
        't_end': {'after': ['sessionFinalized']},
        't_after_end': {'after': ['t_end']},
    })
    start = threading.Barrier(8)

    def run(n: int) -> None:
        start.wait()
        finalizing.fire(f'a{n}')
        finalizing.finish(f't_{n}#0')

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert finalizing.fired().count('sessionFinalized') == 1
    assert finalizing.released.count('t_end#0') == 1


# ---------------------------------------------------------------- configuration


def test_update_configuration_applies_no_past_firings_unless_asked(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    world.fire('a')
    new = {'t_y': {'after': ['a'], 'run': 'y'}}
    world.manager().update_configuration(new)
    assert 't_y#0' not in world.storage()
    world.manager().update_configuration(
        {'t_z': {'after': ['a'], 'run': 'z'}}, apply_past=True
    )
    assert world.statuses()['t_z#0'] == 'scheduled'


def test_apply_past_gives_a_new_task_one_instance_for_each_past_payload(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    for n in range(3):
        world.fire('d', {'n': n})
    world.manager().update_configuration({'t_y': {'andEvery': 'd', 'run': 'y'}}, apply_past=True)
    assert [world.kwargs(f't_y#{n}')['d'] for n in range(3)] == [{'n': 0}, {'n': 1}, {'n': 2}]


def test_update_configuration_looks_again_at_what_waits(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a')
    world.manager().update_configuration({'t_x': {'after': ['a'], 'run': 'x'}})
    assert world.released == ['t_x#0']


def test_an_instance_waits_for_what_its_task_asks_for_now(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a')
    world.manager().update_configuration({'t_x': {'after': ['a', 'c'], 'run': 'x'}})
    assert world.fire('b').released == []
    assert world.fire('c').released == ['t_x#0']


def test_a_session_keeps_the_configuration_that_it_began_with(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a')
    world.configure({'t_other': {'after': ['b']}})
    assert world.fire('b').released == ['t_x#0']
    assert list(world.storage().tasks) == ['t_x']


def test_removed_tasks_abandon_what_waits_and_leave_what_runs(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}, 't_y': {'after': ['a']}})
    world.fire('a')
    world.manager().remove_tasks(['t_x', 't_y'])
    assert world.statuses() == {'t_x#0': 'abandoned', 't_y#0': 'scheduled'}
    assert world.finish('t_y#0')
    assert world.fired() == ['a', 't_x:abandoned', 't_y']
    with pytest.raises(InvalidConfiguration, match='t_nothing'):
        world.manager().remove_tasks(['t_nothing'])


def test_cancel_abandons_what_waits_now_and_later(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}, 't_y': {'after': ['b']}})
    world.fire('a')
    world.manager().cancel('the customer left')
    firing = world.fire('b')
    assert firing.abandoned == ['t_y#0']
    assert world.released == []
    assert 'the customer left' in world.storage()['t_x#0'].metadata['reason']


def test_explain_says_what_is_missing(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}, 't_y': {'after': ['c']}})
    world.fire('a')
    texts = [str(e) for e in world.manager().explain()]
    assert texts[0] == 't_x#0 is unstarted: it has a and waits for b'
    assert texts[1].startswith('t_y has no instance')
    assert world.manager().explain('t_x')[0].missing == ['b']
    with pytest.raises(InvalidConfiguration, match='t_z'):
        world.manager().explain('t_z')


# ------------------------------------------------------------------------ hooks


def test_hooks_are_called_after_the_commit_and_undo_nothing(world: Any) -> None:
    from celery_triggers.manager import TriggerManager
    from celery_triggers.registry import trigger_managers

    calls: list[Any] = []

    class Watching(TriggerManager):
        def _post_fire(self, trigger_name: str, tasks_scheduled: list[Any]) -> None:
            calls.append((trigger_name, [i.name for i in tasks_scheduled]))
            raise RuntimeError('undoes nothing')

        def _post_replay(self, task_instance: Any) -> None:
            calls.append(('replay', task_instance.name))

        def _post_skip(self, task_instance: Any, cascade: bool) -> None:
            calls.append(('skip', task_instance.name, cascade))

    with pytest.raises(Exception, match='not registered'):
        Watching(world.storage()).fire('a')
    assert not world.storage().exists
    trigger_managers.register('watching')(Watching)
    try:
        world.manager_key = 'watching'
        world.configure({'t_x': {'after': ['a']}, 't_y': {'after': ['t_x']}})
        world.fire('a')
        world.fail('t_x#0')
        world.manager().replay_failed_instance('t_x#0')
        world.fail('t_x#1')
        world.manager().skip_failed_instance('t_x#1', cascade=True)
    finally:
        trigger_managers.unregister('watching')
    assert calls == [
        ('a', ['t_x#0']),
        ('t_x:failed', []),
        ('replay', 't_x#1'),
        ('t_x:failed', []),
        ('t_x', ['t_y#0']),
        ('skip', 't_x#1', True),
    ]
