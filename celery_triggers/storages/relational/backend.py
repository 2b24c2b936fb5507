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
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

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
from celery_triggers.storages.relational.database import (
    Clash,
    Database,
    Found,
    NamedRow,
    Transaction,
    Wanted,
)

__all__ = ['RelationalStorageBackend']

#: How many sessions :meth:`RelationalStorageBackend.uids` reads at a time.
UIDS_AT_ONCE = 1000


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
