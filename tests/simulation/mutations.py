"""The product with one mechanism broken: each must be caught, or the model is too weak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine import step as engine_step
from celery_triggers.engine.cascade import Cascade
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.instances import AGAIN, Instance
from celery_triggers.engine.reception import Reception
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import Status
from celery_triggers.manager import checks, gate_life
from celery_triggers.manager.change import Change
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.follow_up import make_change
from celery_triggers.manager.gate_life import GateEnd
from celery_triggers.manager.release import Release
from celery_triggers.storages.agenda import Agenda
from celery_triggers.storages.document.document import Document
from celery_triggers.sweep import sweep as overdue
from celery_triggers.sweep.overdue_instance import OverdueInstance
from tests.simulation import scenario
from tests.simulation.run import Focus

#: A class with the name of an attribute and what takes its place, given the original.
Patch = tuple[Any, str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Mutation:
    """A broken mechanism.

    Attributes:
        patches: What is broken.
        breaks: The invariants of which one is found to be broken, by their first words.
        focus: What the runs look at.
    """

    name: str
    patches: list[Patch]
    breaks: tuple[str, ...]
    focus: Focus = field(default_factory=Focus)

    def __str__(self) -> str:
        return self.name


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """Break the product for a while."""
    originals = [(owner, name, owner.__dict__[name]) for owner, name, _ in mutation.patches]
    for owner, name, make in mutation.patches:
        setattr(owner, name, make(owner.__dict__[name]))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _after(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a patch that passes what a method returns through ``change``."""

    def make(original: Any) -> Any:
        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            return change(self, original(self, *args, **kwargs))

        return patched

    return make


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda original: function


def _without(*columns: str) -> Callable[[Any, Any], Any]:
    """Return a change of a conditional write that guards these columns no longer."""

    def change(_: Any, write: Any) -> Any:
        write.guards = [
            {k: v for k, v in guard.items() if k not in columns} for guard in write.guards
        ]
        return write

    return change


# ------------------------------------------------------------------- what is broken


def _ignoring_incarnations(original: Any) -> Any:
    def write(self: Document, write: Any, now: int) -> Any:
        if self.incarnation:
            write.incarnation = self.incarnation
        return original(self, write, now)

    return write


def _anybodys(self: Delivery, step: Step, what: str, needs_token: bool) -> Any:
    instance = step.session.instance(self.name)
    if instance is None or (needs_token and self._is_stale(instance, step.now)):
        return None
    return instance


def _forgetting_version(original: Any) -> Any:
    def commit(self: Document, commit: Any, now: int) -> Any:
        if self.version:
            commit.expected = self.version
        return original(self, commit, now)

    return commit


def _forgetting_rev(original: Any) -> Any:
    def commit(self: Document, commit: Any, now: int) -> Any:
        if self.version == commit.expected:
            for name, row in commit.rows.items():
                known = self.rows.get(name)
                commit.rows[name] = row._replace(rev=(known.rev if known else 0) + 1)
        return original(self, commit, now)

    return commit


def _sent_first(original: Any) -> Any:
    """Send a retry as Celery does it, and commit it as sent."""

    def retry(self: Delivery, countdown: float, *args: Any, **kwargs: Any) -> Any:
        application: Any = self.manager.storage.application
        header = {**self.header, 'attempt': self.header['attempt'] + 1}
        task = application.ledger.runs[self.manager.uid, self.name]
        application.celery.tasks[task].apply_async(headers={'triggers': header})
        return original(self, countdown, *args, **{**kwargs, 'send': False})

    return retry


def _without_push(original: Any) -> Any:
    def take(self: Agenda, *args: Any, **kwargs: Any) -> Any:
        taken = original(self, *args, **kwargs)
        for entry in taken.entries:
            self.set(entry.uid, entry.name, entry.at)
        return taken

    return take


def _always_calm(original: Any) -> Any:
    def take(self: Agenda, *args: Any, **kwargs: Any) -> Any:
        taken = original(self, *args, **kwargs)
        taken.entries = [entry._replace(calm=True) for entry in taken.entries]
        return taken

    return take


def _no_beat(_: Any, write: Any) -> Any:
    write.guards = []
    return write


def _losing_softly(original: Any) -> Any:
    def lose(self: Step, instance: Any, *args: Any, **kwargs: Any) -> Any:
        instance.loss = AGAIN
        return original(self, instance, *args, **kwargs)

    return lose


def _no_dues(original: Any) -> Any:
    def schedule(self: Draft, instance: Any, *args: Any, **kwargs: Any) -> None:
        original(self, instance, *args, **kwargs)
        self.dues.pop(instance.name, None)

    return schedule


def _keeping_dues(original: Any) -> Any:
    def recount(self: Draft, instance: Any, before: Status) -> None:
        original(self, instance, before)
        if self.dues.get(instance.name) == 0:
            del self.dues[instance.name]

    return recount


def _needing_token(original: Any) -> Any:
    def report(self: Delivery, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, 'needs_token': True})

    return report


def _confirming_anything(_: Any, write: Any) -> Any:
    write.guards = [{}]
    return write


def _at_any_time(original: Any) -> Any:
    def fire_delayed(self: Step, event_id: str) -> bool:
        found = self.session.delayed_firing(event_id)
        if found is not None:
            found.due = 0
        return bool(original(self, event_id))

    return fire_delayed


def _keeping_delayed(original: Any) -> Any:
    def drop(self: Step, event_id: str) -> Any:
        kept = self.session.delayed[event_id]
        record = original(self, event_id)
        self.session.delayed[event_id] = kept
        return record

    return drop


def _without_dates(original: Any) -> Any:
    def wait(self: Reception, task: Any, instance: Instance) -> None:
        original(self, task, instance)
        self._draft.dues.pop(instance.name, None)

    return wait


def _not_looking_at_the_date(original: Any) -> Any:
    def judge(self: Cascade, task: Any, instance: Instance) -> None:
        own = task.within
        object.__setattr__(task, 'within', None)
        try:
            original(self, task, instance)
        finally:
            object.__setattr__(task, 'within', own)

    return judge


# ------------------------------------------------------------------------- gates


def _under_a_new_id(original: Any) -> Any:
    def release(self: Cascade, task: Any, instance: Instance) -> None:
        instance.task_id = ''
        original(self, task, instance)

    return release


def _without_event(original: Any) -> Any:
    def prepare(manager: Controller, *args: Any, event_id: Any = None, **kwargs: Any) -> Any:
        if event_id is not None and event_id.startswith('gate:'):
            event_id = None
        return original(manager, *args, event_id=event_id, **kwargs)

    return prepare


def _silently(original: Any) -> Any:
    """Return what ends a gate and has nobody told."""

    def end(self: Cascade, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        draft = self._draft
        for name in draft.to_end:
            draft.touched[name].loss = ''
            draft.dues[name] = 0
        draft.to_end.clear()

    return end


def _as_if_told(original: Any) -> Any:
    def end(self: Step, *args: Any, untold: bool = False) -> None:
        original(self, *args)

    return end


def _revoking_anything(manager: Any, name: str, task_id: str) -> bool:
    def decide(step: Step) -> bool:
        instance = step.session.instance(name)
        if instance is None or instance.gate is None or instance.is_resolved:
            return False
        step.revoke(instance, 'revoked')
        return True

    return make_change(manager, plans.outcome(name), decide).value is not False


def _always_fresh(original: Any) -> Any:
    def wait(self: Step, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, 'fresh': True})

    return wait


def _never_fresh(original: Any) -> Any:
    def wait(self: Step, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, 'fresh': False})

    return wait


def _sharing_the_id(original: Any) -> Any:
    def copy(self: Reception, task: Any, template: Instance, firing: Any) -> Instance:
        draft = self._draft
        new_id, draft.new_id = draft.new_id, lambda: template.task_id
        try:
            made: Instance = original(self, task, template, firing)
        finally:
            draft.new_id = new_id
        return made

    return copy


def _clone_with_own_id(original: Any) -> Any:
    def clone(self: Draft, instance: Instance) -> Instance:
        made: Instance = original(self, instance)
        if made.gate is not None:
            made.task_id = f'{made.task_id} again'
        return made

    return clone


def _known_for_ever(original: Any) -> Any:
    def forget(self: Draft, instance: Instance, gate: Any) -> None:
        original(self, instance, gate)
        del self.gates[instance.task_id]

    return forget


# -------------------------------------------------------------------- the mutations

_KILLS = {'kill process': 0.02, 'kill host': 0.01}
_STOPS = {'stop process': 0.04, 'stop host': 0.02}
_DOUBLES = {'message doubled': 0.4, 'visibility timeout': 0.3}


def _focus(
    *faults: Mapping[str, float], others: float = 0.1, gating: float = 0.0, **options: Any
) -> Focus:
    together: dict[str, float] = {}
    for more in faults:
        together.update(more)
    return Focus(faults=together, others=others, gating=gating, **options)


_GATES = _focus(others=0.0, gating=0.6)

MUTATIONS = [
    Mutation(
        'claim without token', [(Delivery, '_claim_write', _after(_without('token')))],
        ('3 lease', '3 one judge'), _focus(_DOUBLES),
    ),
    Mutation(
        'claim without ETA', [(Delivery, '_claim_write', _after(_without('eta')))],
        ('6 ETA',), _focus(_DOUBLES, {'jump back': 0.01}),
    ),
    Mutation(
        'claim by another attempt', [(Delivery, '_claim_write', _after(_without('attempt')))],
        ('3 attempt',), _focus(_DOUBLES, {'message late': 0.2}),
    ),
    Mutation(
        'confirm without condition', [(Release, 'confirm_write', _after(_confirming_anything))],
        ('6 confirm',), _focus(others=0.0),
    ),
    Mutation(
        'no incarnation in claims',
        [
            (Document, 'write', _ignoring_incarnations),
            # Either of the two would do: task ids are never used again.
            (Delivery, '_claim_write', _after(_without('task_id'))),
        ],
        ('3 incarnation', '3 attempt'), _focus({'message late': 0.3}, _DOUBLES),
    ),
    Mutation(
        'claims are of the whole worker',
        [(Delivery, '_claim_write', _after(_without('loss')))],
        ('6 early',), _focus({'kill process': 0.02, 'begun unnoticed': 0.5}, others=0.0),
    ),
    Mutation(
        'no incarnation in reports', [(Delivery, '_mine', _instead(_anybodys))],
        ('3 incarnation',), _focus(_STOPS, others=0.0),
    ),
    Mutation(
        'no run behind what code fires',
        [(checks, 'depth_in', _instead(lambda *_: 0))],
        ('3 stale run', '3 incarnation'), _focus(_STOPS, others=0.0),
    ),
    Mutation(
        'failure without token', [(Delivery, '_is_stale', _instead(lambda *_: False))],
        ('3 stale token', '3 attempt'), _focus(_STOPS),
    ),
    Mutation(
        'retry sent before its commit', [(Delivery, 'retry', _sent_first)],
        ('5 in time', '4 index', '6 ETA'), _focus(others=0.0),
    ),
    Mutation(
        'sweep without push', [(Agenda, 'take', _without_push)],
        ('5 nothing lost', '5 deliveries'), _focus(_KILLS),
    ),
    Mutation(
        'sweep without outage grace', [(Agenda, 'take', _always_calm)],
        ('10 healthy run',), _focus({'outage': 0.01}, others=0.0),
    ),
    Mutation(
        'sweep without result backend',
        [(OverdueInstance, '_repair', _instead(lambda *_: None))],
        ('5 stored result',), _focus({'kill host': 0.02}, others=0.0),
    ),
    Mutation(
        'no heartbeat', [(Delivery, 'beat_write', _after(_no_beat))],
        ('10 healthy run',), _focus(others=0.0),
    ),
    Mutation(
        'lost early tasks run again', [(Step, 'lose', _losing_softly)],
        ('6 early',), _focus(_KILLS, others=0.0, kinds=('early', 'replaying')),
    ),
    Mutation(
        'release without due date', [(Draft, 'schedule', _no_dues)],
        ('4 index',), _focus(others=0.0),
    ),
    Mutation(
        'deadline without due date', [(Reception, 'wait', _without_dates)],
        ('4 index',), _focus(others=0.0),
    ),
    Mutation(
        'release after the deadline', [(Cascade, 'judge', _not_looking_at_the_date)],
        ('7 deadline', '1 reference', '4 index'), _focus(others=0.0),
    ),
    Mutation(
        'delayed firings at any time', [(Step, 'fire_delayed', _at_any_time)],
        ('6 ETA', '1 exactly once'), _focus({'jump back': 0.2}, others=0.0),
    ),
    Mutation(
        'delayed firings stay', [(Step, '_drop_delayed', _keeping_delayed)],
        ('1 exactly once', '5 nothing lost'), _focus(others=0.0),
    ),
    Mutation(
        'event id not remembered',
        [(Draft, 'remember', _instead(lambda *_: None))],
        ('1 exactly once', '5 nothing lost'), _focus({'answer lost': 0.1}),
    ),
    Mutation(
        'own commit not found', [(Change, '_earlier', _instead(lambda *_: None))],
        ('1 exactly once',), _focus({'answer lost': 0.1}),
    ),
    Mutation(
        'commit without version', [(Document, 'commit', _forgetting_version)],
        ('1', '2', '4', '7', 'error'), _focus(others=0.0),
    ),
    Mutation(
        'commit without rev', [(Document, 'commit', _forgetting_rev)],
        ('3 stale token', '1 reference', '4 index', '5 nothing lost'),
        _focus({'stop process': 0.2}, others=0.0, meddling=0.6, kinds=('late',)),
    ),
    Mutation(
        'due date not removed', [(Draft, 'recount', _keeping_dues)],
        ('4 index',), _focus(others=0.0),
    ),
    Mutation(
        'success needs the token', [(Delivery, '_report', _needing_token)],
        ('3 first success',), _focus(_STOPS, others=0.0),
    ),
    Mutation(
        'deliveries without end',
        [],
        ('5 deliveries',),
        _focus(
            {'message lost': 0.95},
            settings={'triggers_redeliver_after': 1, 'triggers_max_deliveries': 10**6},
        ),
    ),
    Mutation(
        'expiry of what is due', [(overdue, 'WITH_DUE_DATE', _instead(frozenset()))],
        ('retention',),
        _focus({'message late': 0.3}, settings={'triggers_session_expires': 2}, others=0.0),
    ),
    Mutation(
        'no look at the claim before the code',
        [(Delivery, 'still_mine', _instead(lambda self: True))],
        ('6 still mine', '5 alone'), _focus(_STOPS, others=0.0),
    ),
    Mutation(
        'gate released under a new task id', [(Cascade, 'release', _under_a_new_id)],
        ('11 task id', '11 applied once'), _GATES,
    ),
    Mutation(
        'gate applied twice', [(gate_life, 'prepare', _without_event)],
        ('11 applied once', '11 task id'), _GATES,
    ),
    Mutation(
        'expiry of a gate not told', [(Cascade, 'expire', _silently)], ('11 told',), _GATES,
    ),
    Mutation(
        'failure of a gate not told', [(Step, 'fail', _as_if_told)], ('11 told',),
        _focus({'message lost': 0.8}, others=0.0, gating=0.6),
    ),
    Mutation(
        'chord of a stored result not told', [(Step, 'finish', _as_if_told)], ('11 told',),
        _focus({'kill process': 0.05}, others=0.0, gating=0.9, kinds=('late',)),
    ),
    Mutation(
        'end sent once',
        [(OverdueInstance, '_ending', _instead(lambda self: 'postponed'))],
        ('5 nothing lost', '11 told'), _focus({'message lost': 0.3}, others=0.0, gating=0.6),
    ),
    Mutation(
        'end claimed without token', [(GateEnd, '_write', _after(_without('token')))],
        ('3 lease', '11 told'), _focus(_DOUBLES, others=0.0, gating=0.6),
    ),
    Mutation(
        'revocation of a released gate',
        [(scenario, 'revoke_gate', _instead(_revoking_anything))],
        ('11 revoked', '1 reference'), _GATES,
    ),
    Mutation(
        'gate without past firings', [(Step, 'wait_at_gate', _always_fresh)],
        ('1 reference',), _GATES,
    ),
    Mutation(
        'fresh gate with past firings', [(Step, 'wait_at_gate', _never_fresh)],
        ('1 reference',), _GATES,
    ),
    Mutation(
        "copy with its template's task id", [(Reception, 'copy_of', _sharing_the_id)],
        ('11 task id', '11 waiting gates'), _GATES,
    ),
    Mutation(
        'replay of a gate under a new task id', [(Draft, 'clone', _clone_with_own_id)],
        ('11 task id',), _GATES,
    ),
    Mutation(
        'released gate known to wait', [(Draft, '_forget_gate', _known_for_ever)],
        ('11 waiting gates',), _GATES,
    ),
    Mutation(
        'finalization held up by what waits for it',
        [(engine_step, 'waits_for_the_end', _instead(lambda *_: False))],
        ('1 reference',), _GATES,
    ),
]
