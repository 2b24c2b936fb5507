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
FORMAT = 2


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
    eta: int
    changed: int
    claimed: int
    loss: str
    spared: int
    task_id: str
    body: str


#: The columns of a row that a conditional write may test and set.
STATE_COLUMNS = Row._fields[:-1]


class StorageTime(NamedTuple):
    """Stands for the storage's time plus ``offset`` milliseconds in a conditional write.

    In a guard: the column must not be later than that.
    """

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
        dues: Due dates to set, ``{instance name: milliseconds}``; 0 removes one. The name
            ``''`` stands for the session itself.
        gates: Which instance waits at a gate under a task id, ``{task id: instance name}``;
            ``''``: none does any more.
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
    dues: dict[str, int] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Write:
    """A conditional write to one row; it leaves the session's version alone.

    Attributes:
        name: The instance.
        incarnation: Of the session; a write to another incarnation does nothing.
        guards: Alternatives, each ``{column: value}``; one of them must match whole.
        changes: ``{column: value}``; a value may be a :class:`StorageTime`.
        due: The due date to set, 0 to remove it; ``None`` leaves it as it is. Where there is
            no such row, a due date that is left over is removed.
    """

    name: str
    incarnation: str
    guards: Sequence[Mapping[str, Any]]
    changes: Mapping[str, Any]
    due: int | StorageTime | None = None


@dataclass(frozen=True, slots=True)
class StoredFiring:
    """A firing that is part of an application's transaction, to be applied after its commit.

    Attributes:
        id: Its key in the storage's inbox.
        event_id: The application's id or the key.
        delay: In how many milliseconds it is due, counted from when it was stored; or, if
            it is ``absolute``, when that is. 0: at once.
        depth: How many cascades in a row lead to it.
        manager: The registry key of the manager for a session that it begins.
    """

    id: str
    trigger: str
    kwargs: dict[str, Any]
    event_id: str
    delay: int = 0
    absolute: bool = False
    depth: int = 0
    manager: str = 'default'

    def content(self) -> list[Any]:
        """Return everything but its key, in the order of the fields."""
        return [
            self.trigger, self.kwargs, self.event_id, self.delay, self.absolute, self.depth,
            self.manager,
        ]


class Due(NamedTuple):
    """A due date that has come.

    Attributes:
        name: An instance's name, or ``''`` for the session itself.
        calm: Whether somebody has looked at due dates regularly before. If nobody has, then
            whatever should have renewed this one may have been held up too.
        place: Where the session is, if not where the due dates were asked for.
    """

    uid: str
    name: str
    at: int
    calm: bool
    place: str | None = None


@dataclass(slots=True)
class Taken:
    """What a sweep took of the due dates.

    Attributes:
        now: The storage's time in milliseconds.
        more: Whether there may be more that is due already.
        next_at: The earliest date that is still to come, ``None`` if there is none.
    """

    now: int
    entries: list[Due]
    more: bool = False
    next_at: int | None = None


def restless_until(taken_at: int | None, restless: int, now: int, gap: int) -> int:
    """Return until when due dates are not calm, now that somebody asks for them again.

    Args:
        taken_at: When somebody asked last, ``None`` if nobody has.
        restless: Until when they were not calm then.
        gap: See :meth:`.StorageBackend.take_due`.
    """
    if taken_at is None or now - taken_at > gap:
        return now + gap
    # A clock that was ahead for a while must not leave it restless for as long.
    return min(restless, now + gap)


def host_time() -> int:
    """Return this host's time in milliseconds, for media without a clock of their own."""
    return int(time.time() * 1000)


def apply_write(write: Write, row: Row, now: int) -> Row | None:
    """Return the row after a conditional write, or ``None`` where no guard matches."""
    if not any(_matches(guard, row, now) for guard in write.guards):
        return None
    changes = {column: moment_of(value, now) for column, value in write.changes.items()}
    return row._replace(rev=row.rev + 1, **changes)


def moment_of(value: Any, now: int) -> Any:
    """Return a value of a conditional write, a date for what stands for one."""
    return now + value.offset if isinstance(value, StorageTime) else value


def _matches(guard: Mapping[str, Any], row: Row, now: int) -> bool:
    return all(
        getattr(row, column) <= now + value.offset
        if isinstance(value, StorageTime)
        else getattr(row, column) == value
        for column, value in guard.items()
    )
