"""The part of a session that a decision needs, and what the decision changed in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.task_config import TaskConfig


@dataclass(slots=True)
class Head:
    """The small things of a session; read and written whole.

    Attributes:
        incarnation: Differs for each session that ever had this uid.
        digest: The configuration's; ``''`` before the session is first touched.
        manager: The registry key of its trigger manager.
        clock: The storage's time at the last commit, in milliseconds.
        firings: How many firings were applied, cascades and outcomes included.
        unresolved: How many instances are unresolved.
        finalized: Whether ``sessionFinalized`` was fired.
        cancelled: The reason if the session was cancelled, else ``None``.
        metadata: JSON of the application's.
        begun: When :meth:`.TriggerManager.start` was called, if it was, in milliseconds.
        gates: How many gates wait.
        aside: How many of them wait while the session can be final.
    """

    incarnation: str = ''
    digest: str = ''
    manager: str = ''
    created: int = 0
    clock: int = 0
    firings: int = 0
    unresolved: int = 0
    finalized: bool = False
    cancelled: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    begun: int = 0
    gates: int = 0
    aside: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether deadlines count: something was fired, or the session was started."""
        return bool(self.firings or self.begun)


@dataclass(slots=True)
class Counts:
    """How many instances a trigger task has: in all, unresolved, and unstarted.

    Those of gates are counted in all alone.
    """

    total: int = 0
    unresolved: int = 0
    unstarted: int = 0


@dataclass(slots=True)
class Latest:
    """How often a trigger was fired, and with which kwargs last.

    Attributes:
        matches: The same of the firings that matched a filter, by filter. A count of 0
            stands for a filter that is asked and has not matched.
    """

    count: int
    kwargs: dict[str, Any]
    matches: dict[str, Latest] = field(default_factory=dict)

    def of(self, where: str | None) -> Latest | None:
        """Return this of all firings, or of those that matched a filter; ``None``: of none."""
        found = self if where is None else self.matches.get(where)
        return found if found is not None and found.count else None

    def count_match(self, where: str, kwargs: dict[str, Any]) -> None:
        """Note that a firing matched a filter."""
        known = self.matches.get(where)
        self.matches[where] = Latest(known.count + 1 if known else 1, kwargs)


@dataclass(slots=True)
class FiringRecord:
    """One firing as the history keeps it.

    Attributes:
        number: From 1, in the order in which firings were applied.
        at: When, in milliseconds of the storage's clock.
        cause: The instance whose end fired it, or ``None`` for the application's own.
        heard_by: The trigger tasks that it concerned.
        released: The instances that it released; known in the step alone, not stored.
        depth: How many cascades in a row led to it; not stored either.
        passes: Which filters it passes, as far as they were asked; not stored either.
    """

    number: int
    trigger: str
    kwargs: dict[str, Any]
    at: int
    event_id: str | None = None
    cause: str | None = None
    heard_by: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    depth: int = 0
    passes: dict[str, bool] = field(default_factory=dict)


@dataclass(slots=True)
class EventRecord:
    """What came of a step that carries an id: enough to answer a repeat.

    Attributes:
        digest: Of what was asked for, to tell a repeat from a conflict.
        lasting: Whether the id lives as long as the session; a made-up one does not.
        due: When it is to be applied, in milliseconds, as long as it is not.
        call: Identifies the call that did it: a call whose commit got no answer finds its
            own record, which is no duplicate.
    """

    digest: str
    trigger: str
    at: int
    lasting: bool
    call: str = ''
    due: int = 0
    heard_by: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Delayed:
    """A firing that is to be applied later.

    Attributes:
        due: When, in milliseconds of the storage's clock.
    """

    trigger: str
    kwargs: dict[str, Any]
    due: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which part of a session to read.

    Attributes:
        waiting: Triggers whose waiting instances are wanted.
        latest: Triggers whose latest kwargs are wanted.
        tasks: Trigger tasks whose counts are wanted.
        instances: Instances that are wanted by name.
        events: Event ids to look for.
        delayed: Event ids whose delayed firings are wanted, with what is known of the ids.
        whole: Everything; the other fields do not matter then.
    """

    waiting: frozenset[str] = frozenset()
    latest: frozenset[str] = frozenset()
    tasks: frozenset[str] = frozenset()
    instances: frozenset[str] = frozenset()
    events: frozenset[str] = frozenset()
    delayed: frozenset[str] = frozenset()
    whole: bool = False

    def __or__(self, other: Plan) -> Plan:
        return Plan(
            self.waiting | other.waiting,
            self.latest | other.latest,
            self.tasks | other.tasks,
            self.instances | other.instances,
            self.events | other.events,
            self.delayed | other.delayed,
            self.whole or other.whole,
        )


class NotLoaded(Exception):
    """A decision needs more of the session than was read; read ``plan`` too and repeat."""

    def __init__(self, plan: Plan):
        super().__init__(f'the slice lacks {plan}')
        self.plan = plan


@dataclass(slots=True)
class Session:
    """A slice of a session, as a decision works on it.

    The collections hold what was read; ``plan`` tells what that covers, so that
    something absent is told from something not read.
    """

    uid: str
    head: Head
    configuration: Configuration
    plan: Plan
    latest: dict[str, Latest] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    waiting: dict[str, set[str]] = field(default_factory=dict)
    events: dict[str, EventRecord] = field(default_factory=dict)
    delayed: dict[str, Delayed] = field(default_factory=dict)
    history: list[FiringRecord] = field(default_factory=list)

    def latest_of(self, trigger: str) -> Latest | None:
        if not self.plan.whole and trigger not in self.plan.latest:
            raise NotLoaded(Plan(latest=frozenset({trigger})))
        return self.latest.get(trigger)

    def counts_of(self, task: str) -> Counts:
        """Return the task's counts, to be changed in place."""
        if not self.plan.whole and task not in self.plan.tasks:
            raise NotLoaded(Plan(tasks=frozenset({task})))
        counts = self.counts.get(task)
        if counts is None:
            counts = self.counts[task] = Counts()
        return counts

    def instance(self, name: str) -> Instance | None:
        if not self.plan.whole and name not in self.plan.instances and name not in self.instances:
            raise NotLoaded(Plan(instances=frozenset({name})))
        return self.instances.get(name)

    def delayed_firing(self, event_id: str) -> Delayed | None:
        if not self.plan.whole and event_id not in self.plan.delayed:
            raise NotLoaded(Plan(delayed=frozenset({event_id})))
        return self.delayed.get(event_id)

    def waiting_for(self, trigger: str, task: TaskConfig) -> list[Instance]:
        """Return the task's instances that a firing of ``trigger`` can reach, by number."""
        found = self._reached_by(trigger)
        return [i for i in found if i.task == task.name and i.gate is None]

    def gates_waiting_for(self, trigger: str) -> list[Instance]:
        """Return the gates that a firing of ``trigger`` can reach, by name and number."""
        if not self.head.gates:
            return []
        return [instance for instance in self._reached_by(trigger) if instance.gate is not None]

    def _reached_by(self, trigger: str) -> list[Instance]:
        if not self.plan.whole and trigger not in self.plan.waiting:
            raise NotLoaded(Plan(waiting=frozenset({trigger})))
        found = (self.instances[name] for name in self.waiting.get(trigger, ()))
        return sorted(found, key=lambda i: (i.task, i.number))

    def config_of(self, instance: Instance) -> TaskConfig | None:
        """Return an instance's trigger task; ``None`` if the session no longer has it."""
        if instance.gate is not None:
            return instance.gate.config(instance.task)
        return self.configuration.get(instance.task)

    def instances_of(self, task: str) -> list[Instance]:
        """Return all instances of a task by number; the whole session must be loaded."""
        return sorted(
            (i for i in self.instances.values() if i.task == task), key=lambda i: i.number
        )
