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
from tests.simulation.application import SimulatedApplication
from tests.simulation.facts import Actor, FiringFact
from tests.simulation.storage import URL, SimulatedStorageBackend
from tests.simulation.world import World

TRIGGERS = ('a', 'b', 'c')

#: What is fired and heard, some of it more often.
OFTEN = ('a', 'b', 'a', 'b', 'c')

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


class Caller:
    """A process of the application: it fires, and now and then a person interferes.

    Args:
        actions: How many things it does.
        meddling: How likely each is something else than to fire.
    """

    def __init__(
        self,
        world: World,
        application: SimulatedApplication,
        scenario: Scenario,
        actions: int,
        meddling: float = 0.3,
    ):
        self.world = world
        self.application = application
        self.scenario = scenario
        self.actions = actions
        self.meddling = meddling
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
        if not kind:
            self._fire(uid)
            return
        with_uid = self._operations[kind - 1]
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
