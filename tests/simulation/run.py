"""One run: a scenario in a world, until everything is healed and quiet, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.instances import ENDING
from tests.simulation.application import SimulatedApplication
from tests.simulation.broker import Broker
from tests.simulation.check import check_all
from tests.simulation.choices import Choices, shrink
from tests.simulation.ledger import MOST_DELIVERIES, Ledger
from tests.simulation.patching import patched
from tests.simulation.scenario import KINDS, Caller, Scenario, make_scenario
from tests.simulation.storage import POISON, SimulatedStorageBackend
from tests.simulation.worker import Worker
from tests.simulation.world import Killed, Violation, World

#: The settings of every run, in seconds; small, so that little time need be simulated.
SETTINGS = {
    'triggers_lease': 4,
    'triggers_dispatch_grace': 2,
    'triggers_redeliver_after': 20,
    'triggers_max_deliveries': MOST_DELIVERIES,
    'triggers_sweep_interval': 1,
}

#: How likely each kind of fault is wherever it can strike, in a run that has it.
FAULTS = {
    'kill process': 0.01,
    'kill host': 0.004,
    'kill parent': 0.006,
    'cold restart': 0.02,
    'warm restart': 0.02,
    'stop process': 0.01,
    'stop host': 0.006,
    'jump ahead': 0.002,
    'jump back': 0.002,
    'storage error': 0.03,
    'answer lost': 0.03,
    'storage repeats': 0.03,
    'outage': 0.004,
    'publishing fails': 0.1,
    'publishing hangs': 0.05,
    'message lost': 0.08,
    'message refused': 0.05,
    'message doubled': 0.1,
    'message late': 0.08,
    'confirmation lost': 0.08,
    'broker down': 0.05,
    'visibility timeout': 0.05,
    'broker forgets': 0.02,
    'message revoked': 0.05,
    'message expired': 0.05,
    'result backend down': 0.08,
    'begun unnoticed': 0.3,
}

CALLER_FAULTS = ('kill process', 'stop process', 'jump ahead', 'jump back')

#: For how long a healed world may take, in milliseconds: the broker lost each message of an
#: attempt as often as it may.
LONGEST = 700_000


@dataclass(frozen=True)
class Focus:
    """What runs are to look at especially.

    Attributes:
        faults: Kinds that every run has, with how likely they are.
        others: How likely a run has each other kind.
        kinds: The kinds of tasks, the benign one first.
        settings: Over those of every run.
        meddling: How likely something else is done than to fire.
        gating: How likely something is done about a gate.
    """

    faults: Mapping[str, float] = field(default_factory=dict)
    others: float = 0.3
    kinds: Sequence[str] = KINDS
    settings: Mapping[str, Any] = field(default_factory=dict)
    meddling: float = 0.3
    gating: float = 0.2


EVERYTHING = Focus()


@dataclass
class Result:
    """What came of a run."""

    taken: list[int]
    violation: Violation | None = None
    happened: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)


class Simulation:
    """Everything in one run."""

    def __init__(
        self, choices: Choices, trace: list[str] | None = None, focus: Focus = EVERYTHING
    ):
        self.world = World(choices, trace)
        self.ledger = Ledger(self.world)
        self.focus = focus

    def run(self) -> None:
        """Run it to its end.

        Raises:
            Violation: A promise was broken.
        """
        world = self.world
        with patched(world):
            try:
                self._set_up()
                self._live()
                world.heal()
                self._heal()
                check_all(self)
            finally:
                world.end()

    def _set_up(self) -> None:
        world, ledger = self.world, self.ledger
        often = world.pick(1, 1, 3, 6)
        for kind, chance in FAULTS.items():
            if kind in self.focus.faults:
                world.rates[kind] = self.focus.faults[kind]
            elif world.choices.rarely(self.focus.others):
                world.rates[kind] = min(0.3, chance * often)
        world.switching = world.pick(0.2, 0.05, 0.5)
        self.scenario: Scenario = make_scenario(world, self.focus.kinds)
        self.broker = Broker(world)
        self.application = SimulatedApplication(
            world, self.broker, ledger, self.scenario.configuration, self.scenario.tasks,
            {**SETTINGS, **self.scenario.settings, **self.focus.settings},
        )
        ledger.settings = self.application.settings.frozen()
        ledger.storage_class = SimulatedStorageBackend
        ledger.application = self.application
        SimulatedStorageBackend.begin(world, ledger)
        if world.trace is not None:
            world.note(f'scenario: {self.scenario}')
            world.note(f'faults: {sorted(world.rates)}')
        self.callers = [
            Caller(
                world, self.application, self.scenario, 2 + world.choices.draw(5),
                self.focus.meddling, self.focus.gating,
            )
            for _ in range(1 + world.choices.draw(2))
        ]
        if world.choices.rarely(0.1):
            world.happened['poison'] += 1
            SimulatedStorageBackend.poison(3)
            self.application.sweep_limit = 2
        for number in range(1 + world.choices.draw(2)):
            Worker(self.application, f'w{number}', 1 + world.choices.draw(2), sweeps=1)
        for number, caller in enumerate(self.callers):
            self._start_caller(caller, f'app{number}')

    def _start_caller(self, caller: Caller, name: str) -> None:
        process = self.world.spawn(name, caller.run, faults=CALLER_FAULTS)
        # Somebody else goes on with what is left to do.
        process.on_death = lambda: self._start_caller(caller, name)
        caller.process = process

    # ------------------------------------------------------------------- phases

    def _live(self) -> None:
        world = self.world
        world.run(self._callers_are_done, 60_000)
        world.run(lambda: False, int(world.pick(0, 1, 3) * world.lease))

    def _heal(self) -> None:
        self.is_quiet = self.world.run(self._is_quiet, LONGEST + self.world.jumps_back)

    def _callers_are_done(self) -> bool:
        return all(not c.actions and c.process.greenlet.dead for c in self.callers)

    def _is_quiet(self) -> bool:
        return (
            self.broker.is_empty
            and self._callers_are_done()
            and all(worker.is_idle for worker in self.application.workers)
            and not self.alive()
            and not self.delayed()
        )

    def delayed(self) -> list[str]:
        """Return the event ids of firings that are still to be applied."""
        return [
            key[2:]
            for document in self.documents().values()
            for key in document.entries
            if key.startswith('d:')
        ]

    def alive(self) -> list[tuple[str, str, Any]]:
        """Return the instances of which something is still expected.

        Nothing is promised of tasks that make no claim, once their message was sent.
        """
        return [
            (uid, name, row)
            for uid, document in self.documents().items()
            if uid != POISON
            for name, row in document.rows.items()
            if self.ledger.deadline_of(uid, name, row) or row.loss == ENDING or (
                row.status in ('scheduled', 'running') and not self.is_forsaken(uid, name, row)
            )
        ]

    def is_forsaken(self, uid: str, name: str, row: Any) -> bool:
        """Tell whether an instance makes no claim, and its message may be lost."""
        runs = (self.ledger.runs.get((uid, name)), self.scenario.updated.get(uid))
        tasks = [self.scenario.tasks[run] for run in runs if run is not None]
        return row.sends > 0 and not all(task.claims for task in tasks)

    def due_dates(self) -> list[tuple[str, str, int]]:
        return list(SimulatedStorageBackend.space().agenda.entries())

    def was_updated(self, uid: str) -> bool:
        """Tell whether a person changed a session's configuration or cancelled it."""
        return any(
            move.actor.kind == 'person' and move.actor.what[0] in ('update', 'cancel')
            for facts in self.ledger.sessions.values()
            if facts.uid == uid
            for move in facts.moves
        )

    def documents(self) -> dict[str, Any]:
        return dict(SimulatedStorageBackend.space().documents)


def run_once(
    choices: Choices, *, tracing: bool = False, focus: Focus = EVERYTHING
) -> Result:
    """Make a run and judge it."""
    trace: list[str] | None = [] if tracing else None
    simulation = Simulation(choices, trace, focus)
    violation: Violation | None = None
    try:
        simulation.run()
    except Violation as exc:
        violation = exc
    except (Exception, Killed) as exc:
        # A bug of the product, or of the simulation: both must not be overlooked.
        violation = Violation(f'error {type(exc).__name__}', repr(exc))
        violation.__cause__ = exc
    return Result(choices.taken, violation, simulation.world.happened, trace or [])


def run_seed(seed: int, focus: Focus = EVERYTHING) -> Result:
    return run_once(Choices(seed), focus=focus)


def shrink_result(result: Result, seconds: float = 20, focus: Focus = EVERYTHING) -> Result:
    """Return the smallest run that breaks the same promise, with its trace."""
    assert result.violation is not None
    invariant = result.violation.invariant

    def fails(candidate: Sequence[int]) -> list[int] | None:
        again = run_once(Choices(recorded=candidate), focus=focus)
        broken = again.violation is not None and again.violation.invariant == invariant
        return again.taken if broken else None

    smallest = shrink(result.taken, fails, seconds)
    return run_once(Choices(recorded=smallest), tracing=True, focus=focus)
