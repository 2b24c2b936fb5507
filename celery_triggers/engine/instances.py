"""The record of a task instance: what is stored of one execution."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.conditions import On, with_counters
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.names import instance_name
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import RESOLVED, Event, Status, next_status

#: An instance whose worker is lost is run again, or fails.
AGAIN, FAIL = 'again', 'fail'


#: Begins the ``loss`` of an instance whose task put another in its own place: nobody holds
#: it for the time being.
HANDED_OVER = 'handed over:'

#: The same, where that may take any time: there is a gate before its end.
HANDED_TO_GATE = 'at a gate:'


#: Stands between that and the process that has claimed it.
CLAIMED_BY = '@'


#: The ``loss`` of a gate that has ended without having run, until whoever waits for its
#: result has been told.
ENDING = 'ending'


def replay_at_most(replays: int | None) -> str:
    """Return the ``loss`` of an instance that is then replayed, so many times in a row."""
    return f'replay:{"" if replays is None else replays}'


@dataclass(slots=True)
class Instance:
    """One execution of a trigger task.

    The fields up to ``claimed`` are the instance's *state*: a storage can test and set
    them in one conditional write without reading the rest. The others are its *body*.

    Attributes:
        rev: Grows by one with every write; a commit tests it, so that a conditional
            write in between is noticed.
        attempt: 0 for the first run; each Celery retry adds one.
        token: The claim of the delivery that runs it.
        lease: When the claim lapses, in milliseconds of the storage's clock.
        sends: How often this attempt's message was sent and confirmed.
        eta: Before when it must not run (a countdown), in the same milliseconds.
        changed: When the status last changed in a commit, in the same milliseconds.
        claimed: When it was claimed, which is no commit; 0 if it does not run.
        loss: What becomes of it if its worker is lost, set by the claim: one of
            :data:`AGAIN`, :data:`FAIL` and ``replay:<most replays>``, perhaps after
            :data:`HANDED_OVER` or :data:`HANDED_TO_GATE`, and before :data:`CLAIMED_BY` and the
            id of the process that has claimed it. Of a gate that has ended: :data:`ENDING`.
        spared: 1 if its lease was extended, after a time in which nobody could have
            renewed it, and its worker has not been heard of since.
        received: ``{leaf key: kwargs}``, as fired.
        times: When each earlier status was reached, ``{status: milliseconds}``.
        metadata: JSON for people and applications.
        lost: The claims of this attempt that were given up.
        message: What a retry is sent with, ``{"task", "args", "kwargs", "options"}``: its
            code may have changed all of them. Empty before the first one.
        cascade: How many cascades in a row led to it.
        until: When it expires if it still waits, in milliseconds, where the application has
            said so; 0: its task's ``within`` counts, if it has one.
        log_level: The highest level that its logger context saw.
        gate: What it brings along if a gate made it, and not the session's configuration.
    """

    task: str
    number: int
    status: Status = Status.UNSTARTED
    attempt: int = 0
    task_id: str = ''
    token: str = ''
    lease: int = 0
    sends: int = 0
    eta: int = 0
    rev: int = 0
    changed: int = 0
    claimed: int = 0
    loss: str = ''
    spared: int = 0
    received: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    depth: int = 0
    log_level: int = logging.NOTSET
    logs_resolved: bool = False
    lost: list[str] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=dict)
    cascade: int = 0
    until: int = 0
    gate: Gate | None = None

    @property
    def name(self) -> str:
        return instance_name(self.task, self.number)

    @property
    def is_resolved(self) -> bool:
        return self.status in RESOLVED

    @property
    def is_ending(self) -> bool:
        """Whether those who wait for a gate's result are still to be told that it ended."""
        return self.loss == ENDING

    @property
    def policy(self) -> str:
        """What becomes of it if its worker is lost."""
        said = self.loss.partition(CLAIMED_BY)[0]
        return said.removeprefix(HANDED_OVER).removeprefix(HANDED_TO_GATE)

    @property
    def is_handed_over(self) -> bool:
        """Whether another task takes its place."""
        return self.loss.startswith((HANDED_OVER, HANDED_TO_GATE))

    @property
    def replays_when_lost(self) -> bool:
        """Tell whether another instance takes its place if its worker is lost."""
        kind, _, most = self.policy.partition(':')
        return kind == 'replay' and (not most or (most.isdecimal() and self.depth < int(most)))

    def follow(self, event: Event, now: int) -> None:
        """Take one step of the table.

        Raises:
            InvalidTransition: The table has no such step from the present status.
        """
        self.move(next_status(self.name, self.status, event), now)

    def move(self, status: Status, now: int) -> None:
        """Set the status and remember when the old one was reached."""
        self.times = self.timestamps()
        self.status = status
        self.changed = now
        self.claimed = 0

    def timestamps(self) -> dict[str, int]:
        """Return when each status was last reached, the present one included."""
        if self.status is Status.RUNNING:
            scheduled, running = Status.SCHEDULED.value, Status.RUNNING.value
            # A storage's clock may go back between the two.
            claimed = max(self.claimed, self.changed)
            return {**self.times, scheduled: self.changed, running: claimed}
        return {**self.times, self.status.value: self.changed}

    def receive(self, leaf: On, kwargs: dict[str, Any]) -> bool:
        """Give kwargs to a leaf, unless it has some; tell whether it took them."""
        if leaf.key in self.received:
            return False
        self.received[leaf.key] = kwargs
        return True

    def waits_for(self, config: TaskConfig) -> set[str]:
        """Return the triggers that could still reach this instance."""
        if self.status is not Status.UNSTARTED:
            return set()
        return config.triggers_beside(self.received)

    def deadline(self, config: TaskConfig | None) -> int:
        """Return when it expires if it still waits, in milliseconds; 0: never."""
        if self.status is not Status.UNSTARTED:
            return 0
        if self.until or config is None or config.within is None:
            return self.until
        # What waits has changed only once: when it was made.
        return self.changed + int(config.within * 1000)

    @property
    def shows_that_it_waits(self) -> bool:
        """Whether the result backend says that it waits, which has to be said again."""
        return self.gate is not None and self.gate.has_result

    def next_look(self, config: TaskConfig | None, now: int, refresh: int) -> int:
        """Return when it is to be looked at if it still waits, in milliseconds; 0: never.

        Args:
            refresh: After how many milliseconds what the result backend says of it expires
                else; 0: never.
        """
        deadline = self.deadline(config)
        if not (refresh and self.shows_that_it_waits):
            return deadline
        return min(filter(None, (deadline, now + refresh)))

    def missing(self, config: TaskConfig) -> list[str]:
        """Return the triggers of ``after`` and ``and_every`` of which something is missing."""
        missing = [
            leaf.trigger for leaf in with_counters(config.wanted.leaves())
            if leaf.key not in self.received
        ]
        return list(dict.fromkeys(missing))

    def kwargs(self, config: TaskConfig | None) -> dict[str, dict[str, Any]]:
        """Return the kwargs by trigger: static ones with the fired ones over them."""
        if config is None or not config.with_params:
            return dict(self.received)
        return merged(config.with_params, self.received)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two JSON objects recursively; where both have a value, ``over`` wins."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged(below, value)
        result[key] = value
    return result
