"""What passes between a storage and its medium: rows and strings, without meaning.

A storage knows nothing of the rules. It keeps, for each session, a version token, a
head, *entries* (strings by key), *rows* (one for each instance) and an index from
triggers to the instances that wait for them. Everything below is plain data.

The keys of entries: ``t:<task>`` counts, ``l:<trigger>`` latest kwargs, ``e:<event id>``
lasting event ids, ``h:<number>`` history.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: Grows with every change of the stored format. A storage that meets a newer one than
#: it knows refuses the session.
FORMAT = 1


class Row(NamedTuple):
    """An instance as it is stored: its state in columns, its body as text.

    The columns are those of :class:`~celery_triggers.engine.instances.Instance`.
    """

    rev: int
    status: str
    attempt: int
    token: str
    lease: int
    sends: int
    due: int
    changed: int
    claimed: int
    task_id: str
    body: str


#: The columns of a row that a conditional write may test and set.
STATE_COLUMNS = Row._fields[:-1]


class StorageTime(NamedTuple):
    """Stands for the storage's time plus ``offset`` milliseconds in a conditional write."""

    offset: int = 0


@dataclass(slots=True)
class Request:
    """What to read of a session.

    Attributes:
        entries: Keys of entries.
        names: Names of instances.
        triggers: Triggers whose waiting instances are wanted, rows included.
        passing: An event id that was made up for this change, or ``''``.
        whole: Everything instead.
    """

    entries: Sequence[str] = ()
    names: Sequence[str] = ()
    triggers: Sequence[str] = ()
    passing: str = ''
    whole: bool = False


@dataclass(slots=True)
class Slice:
    """What was read of a session, all at one moment.

    Attributes:
        now: The storage's time in milliseconds.
        version: Its version token; ``''`` where there is no such session.
        entries: The entries that exist, a found passing event under ``p:<event id>``.
        rows: The rows that exist, those of waiting instances included.
        waiting: ``{trigger: instance names}``.
    """

    now: int
    version: str = ''
    head: str = ''
    entries: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Commit:
    """Changes to apply together if the session's version is still ``expected``.

    Attributes:
        expected: The version that was read; ``''`` for a session that did not exist.
        version: The version afterwards.
        puts: Entries to set.
        drops: Entries to remove.
        rows: Rows to write. Each is applied only over a row whose ``rev`` is one less.
        waits_added, waits_removed: ``(trigger, instance name)``.
        passing: A made-up event id, its text, and how many seconds to keep it.
        configuration: ``(digest, text)``; stored once, by content.
    """

    expected: str
    version: str
    incarnation: str
    head: str
    puts: dict[str, str]
    drops: list[str]
    rows: dict[str, Row]
    waits_added: list[tuple[str, str]]
    waits_removed: list[tuple[str, str]]
    passing: tuple[str, str, int] | None = None
    configuration: tuple[str, str] | None = None


@dataclass(slots=True)
class Write:
    """A conditional write to one row; it leaves the session's version alone.

    Attributes:
        name: The instance.
        incarnation: Of the session; a write to another incarnation does nothing.
        guards: Alternatives, each ``{column: value}``; one of them must match whole.
        changes: ``{column: value}``; a value may be a :class:`StorageTime`.
    """

    name: str
    incarnation: str
    guards: Sequence[Mapping[str, Any]]
    changes: Mapping[str, Any]


def host_time() -> int:
    """Return this host's time in milliseconds, for media without a clock of their own."""
    return int(time.time() * 1000)


def apply_write(write: Write, row: Row, now: int) -> Row | None:
    """Return the row after a conditional write, or ``None`` where no guard matches."""
    if not any(all(getattr(row, k) == v for k, v in g.items()) for g in write.guards):
        return None
    changes: dict[str, Any] = {
        column: now + value.offset if isinstance(value, StorageTime) else value
        for column, value in write.changes.items()
    }
    return row._replace(rev=row.rev + 1, **changes)
