"""Sessions in the tables of a database: what SQL and Django's ORM have in common.

Names can hold anything and be of any length, so keys are hashes of names and the names
stand beside them for people to read.

Tables: sessions (version, head), entries, instances (the rows), waiting (which instance
waits for which trigger), passing (what came of a change, for ten minutes), configurations,
dues (an instance's due date, or the session's own under the hash of no name), gates (by
task id), sweeps (one row: when somebody last looked at due dates) and inbox (firings that
are part of an application's transactions).
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from celery_triggers.engine.names import inbox_name
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import (
    Commit,
    Due,
    Request,
    Row,
    Slice,
    StoredFiring,
    Taken,
    Write,
    apply_write,
    moment_of,
    restless_until,
)

__all__ = ['Clash', 'Database', 'Found', 'RelationalStorageBackend', 'Transaction', 'Wanted']

T = TypeVar('T')

#: How many sessions :meth:`RelationalStorageBackend.uids` reads at a time.
UIDS_AT_ONCE = 1000


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


class NamedRow(NamedTuple):
    """A row under its key."""

    iid: str
    name: str
    row: Row


class Transaction(ABC):
    """What is done within one transaction of a database. Texts are as :func:`kept` has them."""

    # ---------------------------------------------------------------- reading

    @abstractmethod
    def find(self, wanted: Wanted) -> Found:
        """Read a slice."""

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


class Database(ABC):
    """A database with the tables of one prefix, as this process uses it."""

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

    def has_noted(self, gap: int) -> bool:
        """Tell whether this process noted its looking so lately that it need not write."""
        return self.noted_at is not None and time.monotonic() - self.noted_at < gap / 4000


class RelationalStorageBackend(StorageBackend):
    """Keeps a session in tables; the transactions are the subclass's."""

    _database: Database

    def _open_in(self, database: Any) -> None:
        self._sid = key(self.uid)
        self._database = database

    @classmethod
    @abstractmethod
    def _database_at(cls, url: str | None, settings: Settings) -> Database:
        """Return this process's one database at a place."""

    # ----------------------------------------------------------- the contract

    def _read(self, request: Request) -> Slice:
        wanted = _wanted(self._sid, request)
        return _slice(self._database.run(lambda t: t.find(wanted), write=False), request)

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        try:
            self._database.run(lambda t: self._apply(t, commit), write=True)
        except Clash:
            return self._read(request)
        return None

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        return self._database.run(lambda t: self._write_row(t, write), write=True)

    def _delete(self, version: str | None = None) -> bool:
        return self._database.run(lambda t: self._remove(t, version), write=True)

    def _configuration(self, digest: str) -> str | None:
        found = self._database.run(lambda t: t.configuration(digest), write=False)
        return None if found is None else told(found)

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        database, after, start = cls._database_at(url, settings), '', kept(prefix)
        while True:
            found = _uids(database, after, start)
            # A database may fold case or think that some characters are special.
            yield from (uid for uid in (told(uid) for _, uid in found) if uid.startswith(prefix))
            if len(found) < UIDS_AT_ONCE:
                return
            after = found[-1][0]

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        database = cls._database_at(url, settings)
        if database.has_noted(gap):
            now, at = database.run(lambda t: t.next_due(), write=False)
            if at is None or at > now:
                return Taken(now, [], next_at=at)
        taken = database.run(lambda t: _take(t, limit, push, gap), write=True)
        database.noted_at = time.monotonic()
        return taken

    @classmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        known = {key(task_id): task_id for task_id in task_ids}
        database = cls._database_at(url, settings)
        found = database.run(lambda t: t.gates(list(known)), write=False) if known else []
        return {known[gid]: (told(uid), told(name)) for gid, uid, name in found}

    @classmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        found = cls._database_at(url, settings).run(lambda t: t.all_dues(), write=False)
        return iter([(told(uid), told(name), at) for uid, name, at in found])

    # ------------------------------------------------------------------- inbox

    def _firing_body(self, firing: StoredFiring) -> str:
        return kept(self.codec.dumps(firing.content()))

    def stored_firing(self, id_: str) -> tuple[int, StoredFiring] | None:
        found = self._database.run(lambda t: t.in_inbox(id_), write=False)
        if found is None:
            return None
        at, body = found
        return at, StoredFiring(id_, *self.codec.loads(told(body)))

    def forget_firing(self, id_: str) -> None:
        self._database.run(lambda t: t.drop_from_inbox([id_]), write=True)

    # ---------------------------------------------------------------- writing

    def _apply(self, transaction: Transaction, commit: Commit) -> None:
        """Write a commit.

        Raises:
            Clash: The session or one of its rows is not as it had been read.
        """
        sid, uid = self._sid, kept(self.uid)
        if not commit.expected:
            transaction.insert_session(sid, uid, commit)
        elif not transaction.update_session(sid, commit):
            raise Clash
        self._apply_rows(transaction, commit)
        if commit.drops:
            transaction.drop_entries(sid, [key(name) for name in commit.drops])
        if commit.puts:
            transaction.put_entries(
                sid, [(key(n), kept(n), kept(value)) for n, value in commit.puts.items()]
            )
        if commit.waits_removed:
            transaction.drop_waits(sid, [(key(t), key(name)) for t, name in commit.waits_removed])
        if commit.waits_added:
            transaction.put_waits(
                sid, [(key(t), key(name), kept(t)) for t, name in commit.waits_added]
            )
        if commit.passing is not None:
            event, value, seconds = commit.passing
            transaction.put_passing(sid, key(event), kept(value), seconds)
        if commit.configuration is not None:
            digest, text = commit.configuration
            transaction.put_configuration(digest, kept(text))
        self._apply_index(transaction, commit, sid, uid)

    def _apply_rows(self, transaction: Transaction, commit: Commit) -> None:
        rows = [NamedRow(key(name), kept(name), _kept(row)) for name, row in commit.rows.items()]
        new = [named for named in rows if named.row.rev == 1]
        old = [named for named in rows if named.row.rev != 1]
        if new:
            transaction.insert_rows(self._sid, new)
        if old and not transaction.update_rows(self._sid, old):
            raise Clash

    @staticmethod
    def _apply_index(transaction: Transaction, commit: Commit, sid: str, uid: str) -> None:
        gone = [key(name) for name, at in commit.dues.items() if not at]
        dues = [(key(name), kept(name), at) for name, at in commit.dues.items() if at]
        if gone:
            transaction.drop_dues(sid, gone)
        if dues:
            transaction.put_dues(sid, uid, dues)
        over = [key(task_id) for task_id, name in commit.gates.items() if not name]
        gates = [(key(task_id), kept(name)) for task_id, name in commit.gates.items() if name]
        if over:
            transaction.drop_gates(over)
        if gates:
            transaction.put_gates(sid, uid, gates)

    def _write_row(self, transaction: Transaction, write: Write) -> tuple[bool, Row | None]:
        sid, iid = self._sid, key(write.name)
        found = transaction.row_to_write(sid, iid, write.incarnation)
        if found is None:
            if write.due is not None and not transaction.has_row(sid, iid):
                transaction.drop_dues(sid, [iid])
            return False, None
        now, row = found[0], _told(found[1])
        changed = apply_write(write, row, now)
        if changed is None:
            return False, row
        transaction.update_row(sid, iid, _kept(changed))
        if write.due is not None:
            at = moment_of(write.due, now)
            if at:
                transaction.put_dues(sid, kept(self.uid), [(iid, kept(write.name), at)])
            else:
                transaction.drop_dues(sid, [iid])
        return True, changed

    def _remove(self, transaction: Transaction, version: str | None) -> bool:
        was_there = transaction.delete_session(self._sid, version)
        if was_there or version is None:
            transaction.delete_rest(self._sid)
            # Read and then removed by their ids, so that those of open transactions, which
            # some databases would have us wait for, are left alone.
            ids = transaction.inbox_of(self._sid)
            if ids:
                transaction.drop_from_inbox(ids)
        return was_there


def key(name: str) -> str:
    """Return the key of a name: a hash of fixed length."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def kept(text: str) -> str:
    """Return a text as databases can keep it: PostgreSQL's know no null character."""
    if '\x00' in text or '\x1b' in text:
        return text.replace('\x1b', '\x1b1').replace('\x00', '\x1b0')
    return text


def told(text: str) -> str:
    """Return what :func:`kept` was given."""
    if '\x1b' in text:
        return text.replace('\x1b0', '\x00').replace('\x1b1', '\x1b')
    return text


def _kept(row: Row) -> Row:
    return row._replace(
        token=kept(row.token), loss=kept(row.loss), task_id=kept(row.task_id), body=kept(row.body)
    )


def _told(row: Row) -> Row:
    return row._replace(
        token=told(row.token), loss=told(row.loss), task_id=told(row.task_id), body=told(row.body)
    )


def _wanted(sid: str, request: Request) -> Wanted:
    passing = key(request.passing) if request.passing else ''
    if request.whole:
        return Wanted(sid, None, None, None, passing)
    return Wanted(
        sid,
        [key(name) for name in request.entries],
        [key(name) for name in request.names],
        [key(trigger) for trigger in request.triggers],
        passing,
    )


def _slice(found: Found, request: Request) -> Slice:
    result = Slice(found.now)
    if found.version is not None:
        result.version, result.head = found.version, told(found.head)
        result.entries = {told(name): told(value) for name, value in found.entries}
        for trigger, name, row in found.waiting:
            result.waiting.setdefault(told(trigger), []).append(told(name))
            result.rows[told(name)] = _told(row)
        result.rows.update((told(name), _told(row)) for name, row in found.rows)
    if found.passing is not None:
        result.entries[f'p:{request.passing}'] = told(found.passing)
    return result


def _uids(database: Database, after: str, prefix: str) -> list[tuple[str, str]]:
    return database.run(lambda t: t.uids(after, prefix, UIDS_AT_ONCE), write=False)


def _take(transaction: Transaction, limit: int, push: int, gap: int) -> Taken:
    now, taken_at, restless = transaction.last_sweep()
    until = restless_until(taken_at, restless, now, gap)
    if taken_at is None or not 0 <= now - taken_at < gap // 4 or until != restless:
        transaction.note_sweep(now, until)
        transaction.drop_passing(now)
    calm = now >= until
    entries = [
        Due(told(uid), told(name), at, calm)
        for uid, name, at in transaction.take_dues(now, limit, now + push)
    ]
    if len(entries) < limit:
        entries += [
            Due(told(uid), inbox_name(id_), at, calm)
            for id_, uid, at in transaction.take_inbox(now, limit - len(entries), now + push)
        ]
    _, next_at = transaction.next_due()
    return Taken(now, entries, len(entries) >= limit, next_at)
