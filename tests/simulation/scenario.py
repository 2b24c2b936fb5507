"""Random small sessions, and what an application does to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.instances import AGAIN, FAIL, replay_at_most
from celery_triggers.exceptions import (
    EventConflict,
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
    StorageUnavailable,
    UnknownInstance,
)
from celery_triggers.manager import FinalizingTriggerManager, TriggerManager
from celery_triggers.manager.follow_up import follow_up
from celery_triggers.manager.gate_life import apply_gate, revoke_gate
from tests.simulation.application import SimulatedApplication
from tests.simulation.facts import Actor, FiringFact
from tests.simulation.gates import GateFact
from tests.simulation.storage import URL, SimulatedStorageBackend
from tests.simulation.world import World

TRIGGERS = ('a', 'b', 'c')

#: What is fired and heard, some of it more often.
OFTEN = ('a', 'b', 'a', 'b', 'c')

#: The names of gates, before and after those of trigger tasks.
GATES = ('g_1', 'g_2', 'u_1')

ENDS = (':failed', ':abandoned', ':revoked', ':expired')

KINDS = ('late', 'early', 'late', 'replaying', 'plain')

#: What a person's operation may raise when something else came first.
REFUSALS = (InvalidTransition, UnknownInstance, InvalidFiring, InvalidConfiguration)


@dataclass(frozen=True)
class SimulatedTask:
    """A Celery task, as far as it matters.

    Attributes:
        late: Whether it acknowledges late and runs again if its worker is lost.
        claims: Whether it derives from ``TriggerTask``.
        most_replays: For ``replay_lost``; -1: it is not replayed.
        stores: Whether its results are stored.
    """

    name: str
    late: bool = True
    claims: bool = True
    most_replays: int = -1
    stores: bool = True

    @property
    def loss(self) -> str:
        """What becomes of an instance whose worker is lost, as the product writes it."""
        if self.most_replays >= 0:
            return replay_at_most(self.most_replays)
        return AGAIN if self.late else FAIL


@dataclass
class Scenario:
    """What is in a run.

    Attributes:
        updated: The Celery task of what was added to a session, by uid.
    """

    configuration: dict[str, Any]
    tasks: dict[str, SimulatedTask]
    uids: list[str]
    finalizing: bool
    settings: dict[str, Any] = field(default_factory=dict)
    updated: dict[str, str] = field(default_factory=dict)


def make_scenario(world: World, kinds: Sequence[str] = KINDS) -> Scenario:
    """Draw a configuration with few tasks, which make no circle."""
    choices = world.choices
    configuration: dict[str, Any] = {}
    tasks: dict[str, SimulatedTask] = {}
    for number in range(1, 2 + choices.draw(3)):
        name = f't_{number}'
        task = _make_task(world, f'run_{number}', kinds)
        tasks[task.name] = task
        configuration[name] = {'run': task.name, **_directives(world, list(configuration))}
    settings: dict[str, Any] = {}
    if choices.rarely(0.15):
        settings['triggers_session_expires'] = 6
    if choices.rarely(0.3):
        settings['triggers_redeliver_after'] = 2
    if choices.rarely(0.1):
        # The state of a gate's result is stored again after half of that.
        settings.update(result_backend='redis://', result_expires=4)
    return Scenario(
        configuration,
        tasks,
        [f's:{number}' for number in range(1, 2 + choices.draw(2))],
        bool(choices.rarely(0.4)),
        settings,
    )


def _make_task(world: World, name: str, kinds: Sequence[str]) -> SimulatedTask:
    kind = world.pick(*kinds)
    return SimulatedTask(
        name,
        late=kind in ('late', 'replaying') and not (kind == 'replaying' and world.pick(0, 1)),
        claims=kind != 'plain',
        most_replays=1 if kind == 'replaying' else -1,
        stores=not world.choices.rarely(0.2),
    )


def _directives(world: World, earlier: list[str]) -> dict[str, Any]:
    choices = world.choices
    heard = [*earlier[-1:], *OFTEN]
    ends = [f'{task}{end}' for task in earlier for end in ENDS]
    first = heard[choices.draw(len(heard))]
    found: dict[str, Any] = {'after': [first]}
    others = [name for name in (*heard, *earlier) if name != first]
    match choices.draw(5):
        case 1:
            found['after'].append(others[choices.draw(len(others))])
        case 2:
            found['after'] = [{'any': [first, others[choices.draw(len(others))]]}]
        case 3:
            found = {'andEvery': first}
        case 4:
            found['andEvery'] = others[choices.draw(len(others))]
    if choices.rarely(0.3):
        candidates = [*TRIGGERS, *ends]
        found['unless'] = [candidates[choices.draw(len(candidates))]]
    if ends and choices.rarely(0.15):
        found.setdefault('after', []).append(ends[choices.draw(len(ends))])
    if choices.rarely(0.25):
        found['within'] = world.pick(2, 0.3, 8)
    return found


def make_gate(world: World, scenario: Scenario, uid: str) -> GateFact:
    """Draw a gate: what it waits for, and what it sends."""
    choices = world.choices
    found = _gate_directives(world, list(scenario.configuration))
    run = list(scenario.tasks)[choices.draw(len(scenario.tasks))]
    fact = GateFact(
        uid, GATES[choices.draw(len(GATES))], world.serial('gate-'), found, run,
        stores=scenario.tasks[run].stores,
    )
    if choices.rarely(0.2):
        found['within'] = world.pick(2, 0.3, 8)
    elif choices.rarely(0.1):
        fact.until = world.storage_time + world.pick(2000, -1, 8000)
    fact.fresh = bool(choices.rarely(0.25))
    fact.delay = world.pick(300, 5000) if choices.rarely(0.1) else 0
    fact.chord = fact.stores and 'andEvery' not in found and bool(choices.rarely(0.4))
    return fact


def _gate_directives(world: World, names: list[str]) -> dict[str, Any]:
    choices = world.choices
    ends = [f'{name}{end}' for name in (*names, *GATES) for end in ENDS]
    heard = [*OFTEN, *names, 'a', 'b', *GATES, 'sessionFinalized']
    first, second = (heard[choices.draw(len(heard))] for _ in range(2))
    every = {'andEvery': OFTEN[choices.draw(len(OFTEN))]}
    forms: list[dict[str, Any]] = [
        {'after': [first]},
        {'after': [first, second] if second != first else [first]},
        {'after': [{'any': [first, second]}] if second != first else [first]},
        every,
        {'after': [first], **every},
        {'after': [{'trigger': first, 'times': 2 + choices.draw(2)}]},
        {'after': [{'trigger': first, 'where': 'n > 40'}]},
        {},
    ]
    found = forms[choices.draw(len(forms))]
    if choices.rarely(0.3):
        candidates = [*OFTEN, *ends]
        found['unless'] = [candidates[choices.draw(len(candidates))]]
    if choices.rarely(0.1):
        found['after'] = [ends[choices.draw(len(ends))]]
    return found


class Caller:
    """A process of the application: it fires, and now and then a person interferes.

    Args:
        actions: How many things it does.
        meddling: How likely each is something else than to fire.
        gating: How likely each is something about a gate.
    """

    def __init__(
        self,
        world: World,
        application: SimulatedApplication,
        scenario: Scenario,
        actions: int,
        meddling: float = 0.3,
        gating: float = 0.2,
    ):
        self.world = world
        self.application = application
        self.scenario = scenario
        self.actions = actions
        self.meddling = meddling
        self.gating = gating
        self.ledger = application.ledger
        self.repeatable: list[FiringFact] = []
        self.process: Any = None

    def run(self) -> None:
        """Do everything; whoever takes over from a killed process goes on."""
        while self.actions:
            self.actions -= 1
            self._act()
            pause = self.world.pick(0, 0, 0.05, 1, 4)
            if pause:
                self.world.sleep(pause)

    def _act(self) -> None:
        uid = self.scenario.uids[self.world.choices.draw(len(self.scenario.uids))]
        kind = self.world.choices.rarely(self.meddling, len(self._operations))
        gate = self.world.choices.rarely(self.gating, 4)
        if not kind and not gate:
            self._fire(uid)
            return
        with_uid = self._operations[kind - 1]
        if gate:
            with_uid = Caller._revoke_gate if gate == 4 else Caller._apply_gate
        try:
            with_uid(self, uid)
        except REFUSALS as exc:
            self.world.note(f'refused: {exc}')
        except StorageUnavailable as exc:
            self.world.note(f'storage unavailable: {exc}')

    def manager(self, uid: str) -> TriggerManager:
        storage = SimulatedStorageBackend(uid, URL, application=self.application)
        kind = FinalizingTriggerManager if self.scenario.finalizing else TriggerManager
        return kind(storage)

    # ------------------------------------------------------------------- firing

    def _fire(self, uid: str) -> None:
        world = self.world
        repeat = self.repeatable and world.choices.rarely(0.2)
        if repeat:
            fact = self.repeatable[world.choices.draw(len(self.repeatable))]
        else:
            trigger = OFTEN[world.choices.draw(len(OFTEN))]
            serial = world.serial('')
            event = world.pick(None, f'event-{serial}')
            fact = FiringFact(uid, trigger, {'n': serial}, event)
            if world.choices.rarely(0.15):
                fact.delay = world.pick(1, 0.1, 6)
            self.ledger.firings.append(fact)
            if event:
                self.repeatable.append(fact)
        self._insist(fact, fact.event_id)

    def _insist(self, fact: FiringFact, event: str | None) -> None:
        """Fire, and repeat with the error's id while the storage does not answer."""
        for _ in range(1 + self.world.pick(2, 0, 6)):
            what = ('fire', fact.trigger, fact.kwargs)
            try:
                with self.ledger.acting(Actor('person', what)):
                    answer = self.manager(fact.uid).fire(
                        fact.trigger, fact.kwargs, event_id=event,
                        countdown=fact.delay or None,
                    )
            except StorageUnavailable as exc:
                event = exc.event_id
                fact.asked.add(event)
                self.world.happened['firing repeated'] += 1
                self.world.sleep(self.world.pick(0.5, 0.01, 5))
                continue
            except EventConflict:
                self.ledger.broken('1 exactly once', f'{event} is said to be a conflict')
            fact.asked.add(answer.event_id)
            fact.answered = True
            return

    def _take_back(self, uid: str) -> None:
        facts = [fact for fact in self.ledger.firings if fact.delay and fact.answered]
        if not facts:
            return
        fact = facts[self.world.choices.draw(len(facts))]
        manager = self.manager(fact.uid)
        for event in filter(None, fact.asked):
            with self.ledger.acting(Actor('person', ('take back', event))):
                if manager.cancel_firing(event):
                    self.world.happened['firing taken back'] += 1

    # -------------------------------------------------------------------- gates

    def _apply_gate(self, uid: str) -> None:
        """Apply a gate, now and then one that was applied before: its message came again."""
        known = self.ledger.gates.facts
        if known and self.world.choices.rarely(0.25):
            fact = known[self.world.choices.draw(len(known))]
            self.world.happened['gate applied again'] += 1
        else:
            fact = make_gate(self.world, self.scenario, uid)
            known.append(fact)
        for _ in range(1 + self.world.pick(2, 0, 6)):
            try:
                self._apply(fact)
            except StorageUnavailable:
                self.world.sleep(self.world.pick(0.5, 0.01, 5))
                continue
            fact.answered = True
            return

    def _apply(self, fact: GateFact) -> None:
        what = ('gate', fact.name, fact.task_id, fact.directives, fact.until, fact.fresh)
        manager = self.manager(fact.uid)

        def shown(instance: str) -> None:
            if fact.stores:
                self.application.show_waiting(fact.task_id, fact.uid, instance)

        with self.ledger.acting(Actor('person', what)):
            outcome = apply_gate(
                manager, fact.name, fact.task_id, fact.gate(),
                until=fact.until, fresh=fact.fresh, waits=shown,
            )
            self.ledger.gates.answered(fact, outcome)
            follow_up(manager, outcome)

    def _revoke_gate(self, uid: str) -> None:
        """Revoke a gate that a worker found to wait, or that did so once."""
        known = [fact for fact in self.ledger.gates.facts if fact.answered]
        if not known:
            return
        fact = known[self.world.choices.draw(len(known))]
        storage = SimulatedStorageBackend
        waiting = storage.gates(URL, self.application.settings.frozen(), [fact.task_id])
        names = [i.name for i in self.manager(fact.uid).storage if i.task_id == fact.task_id]
        if fact.task_id in waiting:
            names = [waiting[fact.task_id][1]]
        # What it waited for may come in between.
        self.world.point()
        for name in names[:1]:
            with self.ledger.acting(Actor('person', ('revoke gate', name, fact.task_id))):
                if revoke_gate(self.manager(fact.uid), name, fact.task_id):
                    self.world.happened['gate revoked'] += 1

    # ---------------------------------------------------- what else can be done

    def _choose(self, uid: str, *statuses: str) -> str | None:
        instances = self.manager(uid).storage.instances
        fitting = [n for n, i in instances.items() if not statuses or i.status in statuses]
        names = fitting or list(instances)
        return names[self.world.choices.draw(len(names))] if names else None

    def _replay(self, uid: str) -> None:
        name = self._choose(uid, 'failed', 'revoked')
        if name is not None:
            kwargs = self.world.pick(None, {})
            with self.ledger.acting(Actor('person', ('replay', name))):
                self.manager(uid).replay_failed_instance(name, kwargs)

    def _skip(self, uid: str) -> None:
        name = self._choose(uid, 'failed', 'revoked')
        if name is not None:
            cascade = bool(self.world.pick(0, 1))
            with self.ledger.acting(Actor('person', ('skip', name, cascade))):
                self.manager(uid).skip_failed_instance(name, cascade=cascade)

    def _set_status(self, uid: str) -> None:
        name = self._choose(uid, 'scheduled', 'running')
        if name is not None:
            status = self.world.pick('finished', 'failed', 'skipped', 'replayed', 'revoked')
            with self.ledger.acting(Actor('person', ('set status', name, status))):
                self.manager(uid).update_instance_status(name, status)

    def _cancel(self, uid: str) -> None:
        with self.ledger.acting(Actor('person', ('cancel',))):
            self.manager(uid).cancel()

    def _update(self, uid: str) -> None:
        world = self.world
        names = list(self.scenario.configuration)
        name = [*names, f't_{len(names) + 1}'][world.choices.draw(len(names) + 1)]
        earlier = [other for other in names if other < name]
        run = next(iter(self.scenario.tasks))
        configuration = {name: {'run': run, **_directives(world, earlier)}}
        self.scenario.updated[uid] = run
        past = bool(world.pick(0, 1))
        with self.ledger.acting(Actor('person', ('update', configuration, past))):
            self.manager(uid).update_configuration(configuration, apply_past=past)

    def _metadata(self, uid: str) -> None:
        name = self._choose(uid)
        if name is not None:
            with self.ledger.acting(Actor('person', ('metadata', name))):
                self.manager(uid).update_instance_metadata(name, {'seen': True})

    def _delete(self, uid: str) -> None:
        with self.ledger.acting(Actor('person', ('delete',))):
            self.manager(uid).storage.delete()
        self.world.happened['session deleted'] += 1

    _operations: tuple[Callable[[Caller, str], None], ...] = (
        _replay, _skip, _set_status, _update, _metadata, _delete, _cancel, _replay, _skip,
        _take_back, _take_back,
    )
