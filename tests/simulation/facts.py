"""What the ledger keeps: who did what, which code ran, what happened to a session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.storages.records import Row

#: A firing as the history keeps it: trigger, kwargs, event id and cause.
Record = tuple[str, dict[str, Any], 'str | None', 'str | None']


@dataclass(slots=True)
class Actor:
    """Who makes a change, as the simulation knows it.

    Attributes:
        kind: ``'person'``, ``'report'`` (of a delivery), ``'sweep'``, ``'beat'`` or ``'end'``.
        what: For a person, the operation with its arguments; for who tells an end, which
            retry it is; else a word.
        token: That of the delivery.
        header: That of the delivery's message.
    """

    kind: str
    what: Any = None
    token: str = ''
    header: Mapping[str, Any] = field(default_factory=dict)


NOBODY = Actor('nobody')


@dataclass(slots=True, eq=False)
class Execution:
    """One run of a task's code."""

    key: tuple[str, str]
    header: Mapping[str, Any]
    token: str
    process: Any
    started: int
    ended: int | None = None
    ending: Any = None


@dataclass(slots=True)
class FiringFact:
    """A firing that somebody asked for.

    Attributes:
        answered: Whether it returned, so that the caller relies on it.
        delay: In how many seconds it is to be applied.
        asked: The event ids under which it was asked for.
    """

    uid: str
    trigger: str
    kwargs: dict[str, Any]
    event_id: str | None
    answered: bool = False
    delay: float = 0
    asked: set[str | None] = field(default_factory=set)


@dataclass(slots=True)
class Move:
    """A change of a session, to be repeated by the reference.

    Attributes:
        at: The session's time, in milliseconds, where it is a commit.
    """

    actor: Actor
    rows: dict[str, tuple[Row | None, Row]]
    records: list[Record]
    at: int = 0


@dataclass(slots=True)
class SessionFacts:
    """What happened in one incarnation of a session."""

    uid: str
    incarnation: str
    manager: str = ''
    moves: list[Move] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)
    deleted: bool = False
    delayed: dict[str, int] = field(default_factory=dict)
    taken_back: set[str | None] = field(default_factory=set)
