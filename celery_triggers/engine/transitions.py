"""The life of an instance, as a table: every rule about statuses is in this module."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from celery_triggers.exceptions import InvalidTransition

__all__ = [
    'RESOLVED',
    'TRANSITIONS',
    'UNHAPPY',
    'WITH_DUE_DATE',
    'Event',
    'Status',
    'next_status',
]


class Status(str, Enum):
    """Where an instance stands in its life."""

    UNSTARTED = 'unstarted'
    SCHEDULED = 'scheduled'
    RUNNING = 'running'
    FINISHED = 'finished'
    FAILED = 'failed'
    REVOKED = 'revoked'
    ABANDONED = 'abandoned'
    REPLAYED = 'replayed'
    SKIPPED = 'skipped'

    def __str__(self) -> str:
        return self.value


class Event(str, Enum):
    """What can happen to an instance."""

    RELEASE = 'release'
    ABANDON = 'abandon'
    EXPIRE = 'expire'
    REVOKE = 'revoke'
    CLAIM = 'claim'
    RETRY = 'retry'
    REQUEUE = 'requeue'
    FINISH = 'finish'
    FAIL = 'fail'
    SKIP = 'skip'
    REPLAY = 'replay'
    #: A success that arrives after its worker had been given up.
    LATE_SUCCESS = 'late success'

    def __str__(self) -> str:
        return self.value


S = Status

#: Statuses after which nothing more is expected of an instance.
RESOLVED = frozenset({S.ABANDONED, S.FINISHED, S.REPLAYED, S.SKIPPED})

#: Statuses from which a person may replay or skip an instance.
UNHAPPY = frozenset({S.FAILED, S.REVOKED})

#: Statuses in which something must happen to an instance by some date.
WITH_DUE_DATE = frozenset({S.SCHEDULED, S.RUNNING})

UNRESOLVED = frozenset(Status) - RESOLVED

TRANSITIONS: Mapping[Event, Mapping[Status, Status]] = {
    Event.RELEASE: {S.UNSTARTED: S.SCHEDULED},
    Event.ABANDON: {S.UNSTARTED: S.ABANDONED},
    Event.EXPIRE: {S.UNSTARTED: S.ABANDONED},
    Event.REVOKE: dict.fromkeys((S.UNSTARTED, S.SCHEDULED, S.RUNNING), S.REVOKED),
    Event.CLAIM: {S.SCHEDULED: S.RUNNING},
    Event.RETRY: {S.RUNNING: S.SCHEDULED},
    Event.REQUEUE: {S.RUNNING: S.SCHEDULED},
    Event.FINISH: dict.fromkeys((S.SCHEDULED, S.RUNNING), S.FINISHED),
    Event.FAIL: dict.fromkeys((S.SCHEDULED, S.RUNNING), S.FAILED),
    # Code skips and replays its own run; a person, what failed or was revoked. A task
    # that makes no claim goes from scheduled.
    Event.SKIP: dict.fromkeys((S.SCHEDULED, S.RUNNING, S.FAILED, S.REVOKED), S.SKIPPED),
    Event.REPLAY: dict.fromkeys((S.SCHEDULED, S.RUNNING, S.FAILED, S.REVOKED), S.REPLAYED),
    Event.LATE_SUCCESS: {S.FAILED: S.FINISHED},
}

#: What a person may set by hand: any resolved status on what is unresolved, and the
#: unhappy ends of what was released.
BY_HAND: Mapping[Status, frozenset[Status]] = {
    **dict.fromkeys(RESOLVED, UNRESOLVED),
    S.FAILED: frozenset({S.SCHEDULED, S.RUNNING}),
    S.REVOKED: frozenset({S.UNSTARTED, S.SCHEDULED, S.RUNNING}),
}


def next_status(instance: str, status: Status, event: Event) -> Status:
    """Return the status after ``event``.

    Raises:
        InvalidTransition: The table has no such step.
    """
    try:
        return TRANSITIONS[event][status]
    except KeyError:
        allowed = ', '.join(sorted(TRANSITIONS[event])) or 'none'
        raise InvalidTransition(
            f'{instance} is {status}; "{event}" is possible only from: {allowed}',
            instance=instance,
            status=status.value,
            wanted=event.value,
        ) from None
