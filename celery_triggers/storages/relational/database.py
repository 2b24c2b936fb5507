"""What the relational storages ask of a database: transactions, and the statements in them."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.records import Commit, Row

__all__ = [
    'FORK_PATIENCE',
    'LOCK_SECONDS',
    'STATEMENT_SECONDS',
    'Attempt',
    'Clash',
    'Database',
    'Failure',
    'Found',
    'NamedRow',
    'Transaction',
    'Wanted',
    'columns_of',
]

T = TypeVar('T')
K = TypeVar('K')

#: How many keys one statement lists at most; SQLite takes 32,766 parameters.
MOST_KEYS = 5000

#: How often a transaction is tried that others undo.
MOST_TRIES = 8

#: For how many seconds a statement waits for a lock, and how long one may take in all: no
#: caller waits for ever, and nobody who has stopped holds up the others.
LOCK_SECONDS = 10.0
STATEMENT_SECONDS = 30.0

#: How many seconds a fork waits at most for the transactions of other threads.
FORK_PATIENCE = 5.0


class Clash(Exception):
    """Somebody else has written meanwhile what a transaction was to write: nothing changed."""


@dataclass(slots=True)
class Wanted:
    """What to read of a session, by the hashes of names; ``None``: all there is."""

    sid: str
    entries: Sequence[str] | None
    instances: Sequence[str] | None
    triggers: Sequence[str] | None
    passing: str

    def split(self, most: int) -> list[Wanted]:
        """Return the same in parts, each with no more than so many keys in a list."""
        lists = (self.entries, self.instances, self.triggers)
        longest = max(len(keys or ()) for keys in lists)
        parts = []
        for start in range(0, max(1, longest), most):
            entries, instances, triggers = (
                # All there is comes with the first part.
                None if keys is None and not start else (keys or ())[start : start + most]
                for keys in lists
            )
            passing = '' if start else self.passing
            parts.append(Wanted(self.sid, entries, instances, triggers, passing))
        return parts


@dataclass(slots=True)
class Found:
    """What a database holds of that, all at one moment.

    Attributes:
        now: The database's wall clock, in milliseconds.
        version, head: ``None`` where there is no such session.
        waiting: ``(trigger, instance name, row)``.
    """

    now: int
    version: str | None = None
    head: str = ''
    entries: list[tuple[str, str]] = field(default_factory=list)
    waiting: list[tuple[str, str, Row]] = field(default_factory=list)
    rows: list[tuple[str, Row]] = field(default_factory=list)
    passing: str | None = None


def columns_of(commit: Commit) -> dict[str, str]:
    """Return what a commit changes of a session's own row."""
    return {
        'version': commit.version, 'incarnation': commit.incarnation, 'head': commit.head,
    }


class NamedRow(NamedTuple):
    """A row under its key."""

    iid: str
    name: str
    row: Row


class Transaction(ABC):
    """What is done within one transaction of a database. Texts are as :func:`.kept` has them."""

    @property
    def most_keys(self) -> int:
        """How many keys one statement lists at most."""
        return MOST_KEYS

    def parted(self, keys: Sequence[K]) -> Iterator[Sequence[K]]:
        """Yield keys, no more at a time than a statement lists."""
        for start in range(0, len(keys), self.most_keys):
            yield keys[start : start + self.most_keys]

    # ---------------------------------------------------------------- reading

    def find(self, wanted: Wanted) -> Found:
        """Read a slice."""
        first, *rest = wanted.split(self.most_keys)
        while True:
            found = self.find_at_once(first)
            others = [self.find_at_once(part) for part in rest]
            if all(other.version == found.version for other in others):
                break
            # Too much for one statement, and somebody has changed it in between.
        for other in others:
            found.entries += other.entries
            found.waiting += other.waiting
            found.rows += other.rows
        return found

    @abstractmethod
    def find_at_once(self, wanted: Wanted) -> Found:
        """Read a slice by one statement, so that all of it is of one moment."""

    @abstractmethod
    def configuration(self, digest: str) -> str | None:
        """Return the text of a configuration."""

    @abstractmethod
    def uids(self, after: str, prefix: str, most: int) -> list[tuple[str, str]]:
        """Return the next sessions by key: ``(sid, uid)``; the prefix may be ignored."""

    @abstractmethod
    def gates(self, gids: Sequence[str]) -> list[tuple[str, str, str]]:
        """Return the gates of these keys: ``(gid, uid, instance name)``."""

    @abstractmethod
    def all_dues(self) -> list[tuple[str, str, int]]:
        """Return every due date: ``(uid, name, at)``."""

    # ------------------------------------------------------------- one session

    @abstractmethod
    def insert_session(self, sid: str, uid: str, commit: Commit) -> None:
        """Make a session.

        Raises:
            Clash: There is one.
        """

    @abstractmethod
    def update_session(self, sid: str, commit: Commit) -> bool:
        """Move a session to the next version; tell whether the expected one was there."""

    @abstractmethod
    def delete_session(self, sid: str, version: str | None) -> bool:
        """Remove a session's own row, if it has this version; tell whether it was there."""

    @abstractmethod
    def delete_rest(self, sid: str) -> None:
        """Remove everything else of a session."""

    @abstractmethod
    def insert_rows(self, sid: str, rows: Sequence[NamedRow]) -> None:
        """Make rows.

        Raises:
            Clash: There is one of them.
        """

    @abstractmethod
    def update_rows(self, sid: str, rows: Sequence[NamedRow]) -> bool:
        """Write rows over those that are one revision older; tell whether all were."""

    @abstractmethod
    def put_entries(self, sid: str, entries: Sequence[tuple[str, str, str]]) -> None:
        """Set entries: ``(eid, name, value)``."""

    @abstractmethod
    def drop_entries(self, sid: str, eids: Sequence[str]) -> None:
        """Remove entries."""

    @abstractmethod
    def put_waits(self, sid: str, waits: Sequence[tuple[str, str, str]]) -> None:
        """Note who waits: ``(tid, iid, trigger)``."""

    @abstractmethod
    def drop_waits(self, sid: str, waits: Sequence[tuple[str, str]]) -> None:
        """Note who waits no longer: ``(tid, iid)``."""

    @abstractmethod
    def put_passing(self, sid: str, eid: str, value: str, seconds: int) -> None:
        """Keep what came of a change for so long from now."""

    @abstractmethod
    def put_configuration(self, digest: str, text: str) -> None:
        """Store a configuration that may be there already."""

    @abstractmethod
    def put_dues(self, sid: str, uid: str, dues: Sequence[tuple[str, str, int]]) -> None:
        """Set due dates: ``(iid, name, at)``."""

    @abstractmethod
    def drop_dues(self, sid: str, iids: Sequence[str]) -> None:
        """Remove due dates."""

    @abstractmethod
    def put_gates(self, sid: str, uid: str, gates: Sequence[tuple[str, str]]) -> None:
        """Note waiting gates: ``(gid, instance name)``."""

    @abstractmethod
    def drop_gates(self, gids: Sequence[str]) -> None:
        """Note that gates wait no longer."""

    @abstractmethod
    def row_to_write(self, sid: str, iid: str, incarnation: str) -> tuple[int, Row] | None:
        """Return the time and a row of this incarnation, which nobody else changes now."""

    @abstractmethod
    def has_row(self, sid: str, iid: str) -> bool:
        """Tell whether there is such a row in any incarnation."""

    @abstractmethod
    def update_row(self, sid: str, iid: str, row: Row) -> None:
        """Write a row that :meth:`row_to_write` returned; its body stays as it is."""

    # ---------------------------------------------------- the place as a whole

    @abstractmethod
    def next_due(self) -> tuple[int, int | None]:
        """Return the time and the earliest date of due dates and inbox."""

    @abstractmethod
    def last_sweep(self) -> tuple[int, int | None, int]:
        """Return the time, when somebody last looked at due dates, until when to be restless."""

    @abstractmethod
    def note_sweep(self, now: int, restless: int) -> None:
        """Remember that somebody looks at due dates now."""

    @abstractmethod
    def drop_passing(self, now: int) -> None:
        """Remove what has been kept for long enough."""

    @abstractmethod
    def take_dues(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        """Move due dates that have come; return them: ``(uid, name, at)``."""

    @abstractmethod
    def take_inbox(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        """Move the dates of stored firings that have come; return ``(id, uid, at)``."""

    # ------------------------------------------------------------------- inbox

    @abstractmethod
    def put_in_inbox(self, id_: str, sid: str, uid: str, body: str) -> int:
        """Store a firing, due at once; return the time."""

    @abstractmethod
    def in_inbox(self, id_: str) -> tuple[int, str] | None:
        """Return when a firing was stored, and its body."""

    @abstractmethod
    def inbox_of(self, sid: str) -> list[str]:
        """Return the ids of a session's stored firings, as far as they are committed."""

    @abstractmethod
    def drop_from_inbox(self, ids: Sequence[str]) -> None:
        """Remove stored firings."""


@dataclass(slots=True)
class Attempt:
    """One run of a transaction.

    Attributes:
        committing: Whether its commit had begun.
        connection: The driver's connection that was open before, ``None``: there was none.
    """

    committing: bool = False
    connection: Any = None


@dataclass(slots=True)
class Failure:
    """What an error means.

    Attributes:
        reason: What the database said.
        undone: Whether the database undid the transaction for the sake of another.
        told: Whether a commit that failed so has certainly not been made.
        stale: Whether the connection had been closed.
    """

    reason: object
    undone: bool
    told: bool
    stale: bool


class Database(ABC):
    """A database with the tables of one prefix, as this process uses it."""

    #: What a database that does not do what it should raises.
    errors: tuple[type[Exception], ...]
    #: Which database it is, without what nobody may read.
    shown: str
    #: When this process last noted that it looked at due dates (seconds, monotonic).
    noted_at: float | None = None

    @abstractmethod
    def run(self, body: Callable[[Any], T], *, write: bool) -> T:
        """Call ``body(transaction)`` in a transaction of its own; it may be called again.

        Args:
            write: Whether it is committed. A deadlock or the like is not told to the caller:
                the transaction is begun again.

        Raises:
            Clash: The body raised it; nothing changed.
            StorageUnavailable: The database did not answer in time.
        """

    def repeated(self, once: Callable[[Attempt], T]) -> T:
        """Run a transaction again that others undid, or whose connection had been closed.

        Repeating a change is safe: a commit meets its own version, and a conditional write
        its own token.
        """
        tries, unknown = 0, False
        while True:
            tries += 1
            attempt = Attempt()
            try:
                return once(attempt)
            except self.errors as exc:
                failure = self.judge(exc, attempt)
                unknown = unknown or (attempt.committing and not failure.told)
                if tries >= (MOST_TRIES if failure.undone else 2 if failure.stale else 1):
                    raise StorageUnavailable(
                        f'the database {self.shown} cannot be used: {failure.reason}',
                        outcome_unknown=unknown,
                    ) from exc
            time.sleep(random.uniform(0, 0.01 * 2 ** min(tries, 5)))

    @abstractmethod
    def judge(self, error: Any, attempt: Attempt) -> Failure:
        """Say what an error, one of :attr:`errors`, means for an attempt."""

    def has_noted(self, gap: int) -> bool:
        """Tell whether this process noted its looking so lately that it need not write."""
        return self.noted_at is not None and time.monotonic() - self.noted_at < gap / 4000
