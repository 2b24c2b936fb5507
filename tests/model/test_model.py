"""Random sessions, step by step beside the reference: whatever happens, both agree.

``TRIGGERS_MODEL_EXAMPLES=1000`` looks for so many times more, at other places each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.gates import Gate, gate_config
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    EventConflict,
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
)
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.follow_up import follow_up
from celery_triggers.manager.gate_life import apply_gate, revoke_gate
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import FakeApplication, Medium
from tests.media import present
from tests.model.reference import FINALIZED, OUTCOMES, RESOLVED, Reference, Refused

TRIGGERS = ['a', 'b', 'c']
TASKS = ['t_1', 't_2', 't_3', 't_4', 't_5']

#: The names of gates: what a firing reaches is worked on in the order of names.
GATES = ['g_1', 'u_1']

names = st.one_of(
    st.sampled_from(TRIGGERS),
    st.sampled_from(TRIGGERS),
    st.sampled_from([*TASKS, *GATES]),
    st.sampled_from(
        [*(f'{name}{end}' for name in (*TASKS[:3], *GATES) for end in OUTCOMES[:3]), FINALIZED]
    ),
)

wheres = st.sampled_from([None, None, 'n > 4', 'p.x < 5'])
counts = st.sampled_from([None, None, 2, 3, {'$kwarg': ['b', 'n']}, {'$kwarg': ['few c', 'n']}])


def _leaf(trigger: str, where: str | None, times: Any) -> Any:
    """Return a leaf; those that differ have different keys, since they stand in one task."""
    few = where == 'n > 4' and times is None
    values = {'trigger': trigger, 'where': where, 'times': times}
    told = {name: value for name, value in values.items() if value is not None}
    if len(told) > 1:
        told['as'] = f'few {trigger}' if few else repr(told)
    return told


leaves = st.one_of(
    names, names, names,
    st.builds(_leaf, st.sampled_from([*TRIGGERS, TASKS[0]]), wheres, counts),
)


def _members(of: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(of, min_size=1, max_size=most, unique_by=repr)


def _branches(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = _members(of)
    at_least = several.flatmap(
        lambda members: st.integers(1, len(members)).map(
            lambda count: {'atLeast': count, 'of': members}
        )
    )
    return st.one_of(
        several.map(lambda m: {'any': m}), several.map(lambda m: {'all': m}), at_least, several
    )


nested = st.recursive(leaves, _branches, max_leaves=4)
conditions = _members(st.one_of(leaves, leaves, nested))

directives = st.fixed_dictionaries(
    {'run': st.just('x')},
    optional={
        'after': conditions,
        'andEvery': names,
        'unless': st.one_of(conditions, leaves.map(lambda leaf: [leaf])),
        'withParams': st.just({'a': {'n': -1, 'p': {'x': -1, 'y': -1}}, 'b': {'static': True}}),
    },
)


def _is_legal(configuration: Any) -> bool:
    try:
        Configuration.parse(configuration)
    except InvalidConfiguration:
        return False
    return True


directives = directives.filter(lambda found: _is_legal({'t_x': found}))


def _is_legal_gate(found: Any) -> bool:
    try:
        gate_config('g_1', json.dumps(found, sort_keys=True))
    except InvalidConfiguration:
        return False
    return True


gates = st.fixed_dictionaries(
    {'run': st.just('x')},
    optional={
        'after': conditions,
        # Of the application's own: copies that lead to copies would never end.
        'andEvery': st.sampled_from(TRIGGERS),
        'unless': st.one_of(conditions, leaves.map(lambda leaf: [leaf])),
    },
).filter(_is_legal_gate)


configurations = st.dictionaries(
    st.sampled_from(TASKS[:4]), directives, min_size=1, max_size=4
).filter(_is_legal)

picks = st.integers(0, 1000)
payloads = st.one_of(
    st.just({}), st.integers(0, 9).map(lambda n: {'n': n, 'p': {'x': n}}), st.just({'p': 'flat'})
)
cascades = st.one_of(st.none(), st.integers(0, 9).map(lambda n: {'cascade': n}))


class Sessions(RuleBasedStateMachine):
    """One session in a storage and the reference, moved alike."""

    medium: Medium
    serial = 0

    # ------------------------------------------------------------------ moving

    @initialize(configuration=configurations, finalizing=st.booleans())
    def begin(self, configuration: Any, finalizing: bool) -> None:
        Sessions.serial += 1
        self.application: FakeApplication = self.medium.application(configuration)
        self.manager = self.medium.manager(
            self.application, f'model:{Sessions.serial}', finalizing=finalizing
        )
        self.manager.start()
        # What follows goes through the default manager: the session knows its own.
        self.manager = TriggerManager(self.manager.storage)
        self.reference = Reference(configuration, finalizing)
        self.configuration = dict(configuration)

    def teardown(self) -> None:
        if hasattr(self, 'manager'):
            self.manager.storage.delete()

    def both(self, expected: Callable[[], Any], actual: Callable[[], Any], *errors: Any) -> None:
        """Do it with both; what the reference refuses, the manager refuses."""
        try:
            wanted = expected()
        except Refused:
            wanted = False
        if wanted is False and errors:
            with pytest.raises(errors):
                actual()
        else:
            actual()

    def pick(self, number: int) -> Any:
        """Return some instance of the reference, mostly one that is not resolved."""
        instances = self.reference.ordered()
        alive = [i for i in instances if i.status not in RESOLVED]
        some = alive if alive and number % 5 else instances
        return some[number % len(some)]

    @rule(
        trigger=st.one_of(
            st.sampled_from(TRIGGERS), st.sampled_from([*TRIGGERS, *TASKS[:2], FINALIZED, 'z'])
        ),
        kwargs=payloads,
    )
    def fire(self, trigger: str, kwargs: Any) -> None:
        self.both(
            lambda: self.reference.fire(trigger, kwargs) or True,
            lambda: self.manager.fire(trigger, kwargs),
            InvalidFiring,
        )

    @rule(
        trigger=st.sampled_from(TRIGGERS),
        event=st.sampled_from(['e1', 'e2']),
        kwargs=st.sampled_from([{}, {'n': 1}]),
    )
    def fire_event(self, trigger: str, event: str, kwargs: Any) -> None:
        try:
            repeated = self.reference.fire(trigger, kwargs, event)
        except Refused:
            with pytest.raises(EventConflict):
                self.manager.fire(trigger, kwargs, event_id=event)
        else:
            assert self.manager.fire(trigger, kwargs, event_id=event).duplicate == repeated

    @rule(
        name=st.sampled_from(GATES), again=st.sampled_from([False, False, False, True]),
        number=picks, directives=gates, fresh=st.sampled_from([False, False, True]),
    )
    def apply_gate(
        self, name: str, again: bool, number: int, directives: Any, fresh: bool
    ) -> None:
        known = [i for i in self.reference.instances if i.task_id is not None]
        task_id = f'{Sessions.serial} {len(known)}'
        if again and known:
            name, task_id = known[number % len(known)].task, str(known[number % len(known)].task_id)
        gate = Gate(
            json.dumps(directives, sort_keys=True),
            {'task': 'x', 'args': [], 'kwargs': {}, 'options': {}},
            template='andEvery' in directives,
        )
        outcome = apply_gate(self.manager, name, task_id, gate, fresh=fresh)
        follow_up(self.manager, outcome)
        before = self.reference.apply_gate(name, task_id, directives, 0, fresh)
        assert outcome.duplicate == before

    @precondition(lambda self: any(i.gate for i in self.reference.instances))
    @rule(number=picks, mine=st.sampled_from([True, True, True, False]))
    def revoke_gate(self, number: int, mine: bool) -> None:
        gates = [i for i in self.reference.ordered() if i.gate is not None]
        instance = gates[number % len(gates)]
        task_id = self.manager.storage[instance.name].task_id if mine else 'another'
        revoked = revoke_gate(self.manager, instance.name, task_id)
        assert revoked == (mine and self.reference.revoke_gate(instance))

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks)
    def claim(self, number: int) -> None:
        instance = self.pick(number)
        granted = delivery(self.manager, instance.name).claim()
        assert granted == self.reference.claim(instance)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, result=payloads)
    def finish(self, number: int, result: Any) -> None:
        instance = self.pick(number)
        report = delivery(self.manager, instance.name)
        assert report.finish(result) == self.reference.finish(instance, result)
        # The same message again changes nothing.
        assert not report.finish(result)

    @precondition(lambda self: self.reference.instances)
    @rule(
        number=picks,
        reason=st.sampled_from(['raised', 'raised', 'worker lost', 'time limit']),
        mine=st.sampled_from([True, True, True, False]),
    )
    def fail(self, number: int, reason: str, mine: bool) -> None:
        instance = self.pick(number)
        report = delivery(self.manager, instance.name, 'token' if mine else 'another')
        facts = {'type': 'E', 'message': 'm'}
        assert report.fail(reason, facts) == self.reference.fail(instance, reason, mine)
        assert not report.fail(reason, facts)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, mine=st.sampled_from([True, True, True, False]))
    def revoke(self, number: int, mine: bool) -> None:
        instance = self.pick(number)
        report = delivery(self.manager, instance.name, 'token' if mine else 'another')
        assert report.revoke('revoked') == self.reference.revoke(instance, mine)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, requeue=st.booleans())
    def send_back(self, number: int, requeue: bool) -> None:
        instance = self.pick(number)
        report = delivery(self.manager, instance.name)
        done = report.requeue() if requeue else report.retry(0, send=False)
        assert done == self.reference.back(instance, 0 if requeue else 1)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks)
    def skip(self, number: int) -> None:
        instance = self.pick(number)
        # A failed instance is a person's to skip, not its code's.
        if instance.status not in ('failed', 'revoked'):
            done = delivery(self.manager, instance.name).skip(None)
            assert done == self.reference.skip(instance)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, kwargs=st.sampled_from([{}, {'a': {'n': 'replaced'}}, {'z': {}}]))
    def replay(self, number: int, kwargs: Any) -> None:
        instance = self.pick(number)
        if instance.status not in ('failed', 'revoked'):
            done = delivery(self.manager, instance.name).replay(kwargs, None, 0)
            assert done == self.reference.replay(instance, kwargs, by_hand=False)

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, kwargs=st.sampled_from([{}, {'a': {'n': 'replaced'}}]))
    def replay_by_hand(self, number: int, kwargs: Any) -> None:
        instance = self.pick(number)
        task = self.reference.task_of(instance)
        known = {*instance.got, *(leaf.key for leaf in (task.leaves if task else ()))}
        # Kwargs of a trigger that the task has nothing to do with are refused.
        kwargs = {trigger: value for trigger, value in kwargs.items() if trigger in known}
        self.both(
            lambda: self.reference.replay(instance, kwargs, by_hand=True),
            lambda: self.manager.replay_failed_instance(instance.name, kwargs),
            InvalidTransition,
        )

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, cascade=cascades)
    def skip_by_hand(self, number: int, cascade: Any) -> None:
        instance = self.pick(number)
        self.both(
            lambda: self.reference.skip_by_hand(instance, cascade),
            lambda: self.manager.skip_failed_instance(
                instance.name, cascade is not None, cascade
            ),
            InvalidTransition,
        )

    @precondition(lambda self: self.reference.instances)
    @rule(number=picks, status=st.sampled_from(list(Status)), cascade=cascades)
    def set_status(self, number: int, status: Status, cascade: Any) -> None:
        instance = self.pick(number)
        self.both(
            lambda: self.reference.set_status(instance, status.value, cascade),
            lambda: self.manager.update_instance_status(
                instance.name, status, cascade=cascade is not None, cascade_kwargs=cascade
            ),
            InvalidTransition,
        )

    @rule(
        configuration=st.dictionaries(st.sampled_from(TASKS), directives, min_size=1, max_size=2),
        apply_past=st.booleans(),
    )
    def update(self, configuration: Any, apply_past: bool) -> None:
        if not _is_legal({**self.configuration, **configuration}):
            with pytest.raises(InvalidConfiguration, match='abandonments alone'):
                self.manager.update_configuration(configuration, apply_past)
            return
        self.configuration.update(configuration)
        self.manager.update_configuration(configuration, apply_past)
        self.reference.update(configuration, apply_past)

    @rule(names=st.sets(st.sampled_from(TASKS), min_size=1, max_size=2))
    def remove(self, names: set[str]) -> None:
        self.both(
            lambda: self.reference.remove(names),
            lambda: self.manager.remove_tasks(names),
            InvalidConfiguration,
        )
        self.configuration = {
            name: value for name, value in self.configuration.items()
            if name in self.reference.tasks
        }

    @rule(sure=st.sampled_from([True, False, False, False]))
    def cancel(self, sure: bool) -> None:
        if sure:
            self.reference.cancel()
            self.manager.cancel('for the test')

    # --------------------------------------------------------------- comparing

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, 'reference'):
            return
        # Loaded once for all: a round trip costs more than what is checked here.
        session = self.manager.storage.load()
        self.both_agree(session)
        self.counters_and_index_equal_a_recount(session)
        self.whose_end_is_told(session)
        self.what_holds_at_all_times(session)

    def both_agree(self, session: Any) -> None:
        wanted = self.reference
        released = [r.instance.name for r in self.application.releases if not r.ends]
        assert released == wanted.released
        history = [
            (r.trigger, plain(r.trigger, r.kwargs), r.cause, r.event_id) for r in session.history
        ]
        assert history == wanted.history
        latest = {t: plain(t, found.kwargs) for t, found in session.latest.items() if found.count}
        assert latest == {
            trigger: wanted.past(trigger)[-1] for trigger, _, _, _ in wanted.history
        }
        assert {name: str(i.status) for name, i in session.instances.items()} == {
            i.name: i.status for i in wanted.instances
        }
        for instance in wanted.instances:
            found = self.manager.storage.wrap(session, session.instances[instance.name])
            assert all_plain(found.record.received) == instance.got
            assert all_plain(found.kwargs) == wanted.kwargs(instance)
            assert (found.attempt, found.depth) == (instance.attempt, instance.depth)
            assert found.metadata.get('parent') == instance.parent
            assert instance.task_id in (None, found.task_id)
            assert (found.record.gate is None) == (instance.gate is None)
        unresolved = [task.name for task in self.manager.get_unresolved_tasks()]
        assert unresolved == wanted.unresolved_tasks()

    def counters_and_index_equal_a_recount(self, session: Any) -> None:
        instances = list(session.instances.values())
        assert session.head.firings == len(session.history)
        assert session.head.unresolved == sum(not i.is_resolved for i in instances)
        for task, counts in session.counts.items():
            own = [i for i in instances if i.task == task]
            assert sorted(i.number for i in own) == list(range(counts.total))
            own = [i for i in own if i.gate is None]
            assert counts.unresolved == sum(not i.is_resolved for i in own)
            assert counts.unstarted == sum(i.status is Status.UNSTARTED for i in own)
        assert {i.task for i in instances} <= set(session.counts)
        waiting = {
            (leaf.trigger, i.name)
            for i in instances
            if i.status is Status.UNSTARTED
            for leaf in (i.gate.config(i.task) if i.gate else session.configuration[i.task]).leaves
            if leaf.key not in i.received
        }
        assert {(t, n) for t, names in session.waiting.items() for n in names} == waiting
        gates = [i for i in instances if i.gate is not None and i.status is Status.UNSTARTED]
        assert session.head.gates == len(gates)
        aside = [i.name for i in self.reference.waiting_gates() if not i.keeps_open]
        assert session.head.aside == len(aside)
        assert self.known_gates(session) == {
            i.task_id: (self.manager.uid, i.name) for i in gates
        }

    def known_gates(self, session: Any) -> Any:
        """Return which of a session's task ids the storage knows as those of waiting gates."""
        ids = [i.task_id for i in session.instances.values() if i.task_id]
        return self.medium.storage_class.gates(self.medium.url, self.manager.storage.settings, ids)

    def whose_end_is_told(self, session: Any) -> None:
        """Of a gate that did not run; nobody has told it, so all of them still have to be."""
        told = {r.instance.name for r in self.application.releases if r.ends}
        for instance in session.instances.values():
            if instance.gate is None or not instance.is_ending:
                assert not instance.is_ending
                continue
            assert instance.name in told
            assert instance.status not in (Status.UNSTARTED, Status.SCHEDULED, Status.RUNNING)
        for instance in self.reference.instances:
            stored = session.instances[instance.name]
            # What has failed has told that; a person may say something else of it later.
            told_before = {'failed', 'revoked'}.intersection(stored.times)
            if instance.gate is not None and instance.status == 'abandoned' and not told_before:
                assert stored.is_ending

    def what_holds_at_all_times(self, session: Any) -> None:
        fired = [record.trigger for record in session.history]
        if self.reference.finalizing:
            assert fired.count(FINALIZED) <= 1
        for instance in session.instances.values():
            assert bool(instance.token) == (instance.status is Status.RUNNING)
            assert bool(instance.claimed) == (instance.status is Status.RUNNING)
        released = [r.instance.name for r in self.application.releases if not r.ends]
        assert len(set(released)) == len(released)


def plain(trigger: str, kwargs: Any) -> Any:
    """Return kwargs without what is written for people and not ruled."""
    if not trigger.endswith(OUTCOMES):
        return kwargs
    kept = {key: value for key, value in kwargs.items() if key not in ('reason', 'type', 'message')}
    return {**kept, 'missing': sorted(kept['missing'])} if 'missing' in kept else kept


def all_plain(received: Any) -> Any:
    return {trigger: plain(trigger, kwargs) for trigger, kwargs in received.items()}


#: How many random sessions. What is wrong with the rules shows in memory, where a session
#: costs least; elsewhere it is the storage that is asked about.
EXAMPLES = {'memory': 400, 'redis': 50}
FEW = 15


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    media = present()
    metafunc.parametrize('kind', media, ids=[medium.name for medium in media])


def test_every_storage_agrees_with_the_reference(kind: Medium, tmp_path: Path) -> None:
    more = int(os.environ.get('TRIGGERS_MODEL_EXAMPLES', '0'))
    kind.prepare()
    found = kind.open(tmp_path)
    machine: Any = type(f'Sessions_{kind.name}', (Sessions,), {'medium': found})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=more or EXAMPLES.get(kind.name, FEW),
                stateful_step_count=30,
                derandomize=not more,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        found.clear()
