"""Sessions in an SQL database, by SQLAlchemy Core. SQLite is the embedded default.

A read is one transaction of at most four queries, a commit one transaction. Names can
hold anything and be of any length, so keys are hashes of names and the names stand
beside them for people to read.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from celery_triggers.exceptions import MissingExtra, StorageNotConfigured, StorageUnavailable
from celery_triggers.forks import ForkGate
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import Shared, StorageBackend
from celery_triggers.storages.records import (
    STATE_COLUMNS,
    Commit,
    Due,
    Request,
    Row,
    Slice,
    Taken,
    Write,
    apply_write,
    host_time,
    moment_of,
    restless_until,
)

try:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError, IntegrityError
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    from celery_triggers.storages.sql_schema import Statements, Tables
except ImportError as exc:
    raise MissingExtra('the storage backend sql (SQLAlchemy)', 'sql') from exc

__all__ = ['SQLStorageBackend']

#: How long a statement waits for another process's transaction, in seconds.
BUSY_SECONDS = 30.0

#: The most names that one query lists; SQLite's limit is far above it.
_CHUNK = 500


#: How many seconds a fork waits at most for the transactions of other threads.
_FORK_PATIENCE = 5.0


class _Database:
    """An engine with its tables, made once in each process; it connects when it must."""

    def __init__(self, url: str, prefix: str, options: dict[str, Any]):
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != 'sqlite':
            raise StorageNotConfigured(
                f'the sql storage of this version keeps sessions in SQLite alone, not in '
                f'{parsed.get_backend_name()}; use sqlite:///<file> or redis://...'
            )
        if parsed.database in (None, '', ':memory:'):
            raise StorageNotConfigured(
                'an SQLite database in memory is lost to every other process; name a file: '
                'sqlite:///triggers.db'
            )
        self.tables = Tables(prefix)
        self.statements = Statements(self.tables)
        connect_args = {'timeout': BUSY_SECONDS, **options.get('connect_args', {})}
        self.patience = float(connect_args['timeout'])
        # SQLite's locks do not survive a fork, its notes of them do: a child with an open
        # connection of its parent's believes that it holds locks which it does not, and
        # then processes write over each other (sqlite.org/howtocorrupt.html, 2.6).
        self.gate = ForkGate(_FORK_PATIENCE, self._disconnect)
        self._connected = False
        self._has_tables = False
        #: When this process last noted that it looked at due dates.
        self.noted_at = 0
        self.engine = sa.create_engine(parsed, **{**options, 'connect_args': connect_args})
        event.listen(self.engine, 'connect', self._on_connect)
        event.listen(self.engine, 'begin', _on_begin)

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[sa.Connection]:
        """Open a transaction; a writing one holds the database's write lock from the start.

        Raises:
            StorageUnavailable: The database did not answer in time.
        """
        if not self._has_tables:
            with self._transaction(write=True, matters=False) as connection:
                self.tables.metadata.create_all(connection)
            self._has_tables = True
        with self._transaction(write=write, matters=write) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, write: bool, matters: bool) -> Iterator[sa.Connection]:
        try:
            with self.gate, self.engine.connect() as connection:
                with connection.execution_options(triggers_write=write).begin():
                    yield connection
        except IntegrityError:
            raise
        except (DBAPIError, PoolTimeoutError) as exc:
            raise StorageUnavailable(
                f'the database at {self.engine.url!r} cannot be used: {exc}',
                outcome_unknown=matters,
            ) from exc

    def _disconnect(self) -> None:
        if self._connected:
            self._connected = False
            self.engine.dispose()

    def _on_connect(self, connection: Any, _record: Any) -> None:
        self._connected = True
        # Transactions begin where _on_begin says so, not where sqlite3 guesses.
        connection.isolation_level = None
        deadline = time.monotonic() + self.patience
        while True:
            try:
                connection.execute('PRAGMA journal_mode=WAL')
                break
            except sqlite3.OperationalError:
                # SQLite does not wait here by itself when several processes make the file.
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.02))
        # In WAL mode a commit survives the death of any process; only a power cut may take
        # the last ones, and the file stays sound.
        connection.execute('PRAGMA synchronous=NORMAL')


def _on_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get('triggers_write')
    connection.exec_driver_sql('BEGIN IMMEDIATE' if write else 'BEGIN')


_databases: Shared[_Database] = Shared(_Database)


@storage_backends.register('sql')
class SQLStorageBackend(StorageBackend):
    """Keeps a session in an SQL database; several processes may share it."""

    key = 'sql'
    default_url = 'sqlite:///triggers.db'

    def _open(self) -> None:
        assert self.url is not None
        self._database = _databases.get(
            self.url, self.settings.key_prefix, options=self.options
        )
        self._statements = self._database.statements
        self._sid = _hash(self.uid)

    # ----------------------------------------------------------- the contract

    def _read(self, request: Request) -> Slice:
        with self._database.transaction(write=False) as connection:
            return self._slice(connection, request)

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        with self._database.transaction(write=True) as connection:
            try:
                applied = self._replace_session(connection, commit) and self._put_rows(
                    connection, commit
                )
            except IntegrityError:
                # Another process made the session or the row in between.
                applied = False
            if applied:
                self._put_rest(connection, commit)
                return None
            connection.rollback()
        return self._read(request)

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        place = {'in': self._sid, 'of': _hash(write.name)}
        with self._database.transaction(write=True) as connection:
            found = connection.execute(
                self._statements.row_to_write, {**place, 'incarnation': write.incarnation}
            ).one_or_none()
            if found is None:
                if write.due is not None:
                    self._drop_leftover(connection, write.name)
                return False, None
            row, now = Row(*found), host_time()
            changed = apply_write(write, row, now)
            if changed is None:
                return False, row
            state = {name: getattr(changed, name) for name in STATE_COLUMNS}
            connection.execute(self._statements.update_state, {**place, **state})
            if write.due is not None:
                self._put_due(connection, write.name, moment_of(write.due, now))
            return True, changed

    def _delete(self, version: str | None = None) -> bool:
        with self._database.transaction(write=True) as connection:
            if version is not None:
                found = connection.execute(
                    self._statements.session, {'sid': self._sid}
                ).one_or_none()
                if found is None or found.version != version:
                    return False
            counts = [
                connection.execute(statement, {'sid': self._sid}).rowcount
                for statement in self._statements.delete_session
            ]
        return bool(counts[0])

    def _configuration(self, digest: str) -> str | None:
        with self._database.transaction(write=False) as connection:
            text: str | None = connection.scalar(
                self._statements.configuration, {'digest': digest}
            )
        return text

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        database = cls._database_at(url, settings)
        with database.transaction(write=False) as connection:
            found = connection.scalars(database.statements.uids).all()
        # LIKE folds case in SQLite and treats some characters specially.
        return iter([name for name in found if name.startswith(prefix)])

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        database = cls._database_at(url, settings)
        statements = database.statements
        if _nothing_to_note(database, gap):
            with database.transaction(write=False) as connection:
                now, at = host_time(), connection.scalar(statements.next_due)
            if at is None or at > now:
                return Taken(now, [], next_at=at)
        with database.transaction(write=True) as connection:
            now = host_time()
            calm = _note_sweep(connection, statements, now, gap)
            database.noted_at = now
            found = connection.execute(
                statements.dues_until, {'now': now, 'most': limit}
            ).all()
            if found:
                moves = [{'in': due.sid, 'of': due.iid, 'to': now + push} for due in found]
                connection.execute(statements.move_due, moves)
            entries = [Due(due.uid, due.name, due.at, calm) for due in found]
            next_at = connection.scalar(statements.next_due)
        return Taken(now, entries, len(entries) >= limit, next_at)

    @classmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        database = cls._database_at(url, settings)
        known = {_hash(task_id): task_id for task_id in task_ids}
        found: dict[str, tuple[str, str]] = {}
        with database.transaction(write=False) as connection:
            for ids in _chunked(list(task_ids)):
                for gate in connection.execute(database.statements.gates, {'ids': ids}):
                    found[known[gate.gid]] = (gate.uid, gate.name)
        return found

    @classmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        database = cls._database_at(url, settings)
        with database.transaction(write=False) as connection:
            found = connection.execute(database.statements.all_dues).all()
        return iter([(due.uid, due.name, due.at) for due in found])

    @classmethod
    def _database_at(cls, url: str | None, settings: Settings) -> _Database:
        return _databases.get(
            url or cls.default_url, settings.key_prefix, options=settings.storage_options
        )

    # ---------------------------------------------------------------- reading

    def _slice(self, connection: sa.Connection, request: Request) -> Slice:
        statements = self._statements
        found = connection.execute(statements.session, {'sid': self._sid}).one_or_none()
        result = Slice(host_time(), *(found or ()))
        if found is not None:
            entries = self._select(
                connection, statements.entries, statements.all_entries, request.entries, request
            )
            result.entries.update((name, value) for name, value in entries)
            waiting = self._select(
                connection, statements.waiting, statements.all_waiting, request.triggers, request
            )
            for trigger, name, *row in waiting:
                result.waiting.setdefault(trigger, []).append(name)
                result.rows[name] = Row(*row)
            rows = self._select(
                connection, statements.rows, statements.all_rows, request.names, request
            )
            result.rows.update((name, Row(*row)) for name, *row in rows)
        if request.passing:
            value = connection.scalar(
                statements.passing,
                {'sid': self._sid, 'eid': _hash(request.passing), 'now': result.now},
            )
            if value is not None:
                result.entries[f'p:{request.passing}'] = value
        return result

    def _select(
        self,
        connection: sa.Connection,
        some: Any,
        all_: Any,
        names: Sequence[str],
        request: Request,
    ) -> Iterator[Any]:
        """Yield the rows of these names, or of all where the whole session is wanted."""
        if request.whole:
            yield from connection.execute(all_, {'sid': self._sid})
            return
        for ids in _chunked(names):
            yield from connection.execute(some, {'sid': self._sid, 'ids': ids})

    # ---------------------------------------------------------------- writing

    def _replace_session(self, connection: sa.Connection, commit: Commit) -> bool:
        """Move the session to the new version; tell whether the expected one was there."""
        values = {
            'version': commit.version, 'incarnation': commit.incarnation, 'head': commit.head,
        }
        if not commit.expected:
            connection.execute(
                self._statements.insert_session, {'sid': self._sid, 'uid': self.uid, **values}
            )
            return True
        updated = connection.execute(
            self._statements.update_session,
            {'of': self._sid, 'expected': commit.expected, **values},
        )
        return updated.rowcount == 1

    def _put_rows(self, connection: sa.Connection, commit: Commit) -> bool:
        """Write the rows; tell whether each was still as it had been read."""
        new = [
            {'sid': self._sid, 'iid': _hash(name), 'name': name, **row._asdict()}
            for name, row in commit.rows.items()
            if row.rev == 1
        ]
        if new:
            connection.execute(self._statements.insert_rows, new)
        old = [
            {'in': self._sid, 'of': _hash(name), 'before': row.rev - 1, **row._asdict()}
            for name, row in commit.rows.items()
            if row.rev > 1
        ]
        if not old:
            return True
        return connection.execute(self._statements.update_rows, old).rowcount == len(old)

    def _put_rest(self, connection: sa.Connection, commit: Commit) -> None:
        statements = self._statements
        for ids in _chunked([*commit.drops, *commit.puts]):
            connection.execute(statements.delete_entries, {'sid': self._sid, 'ids': ids})
        changes: list[tuple[Any, list[dict[str, Any]]]] = [
            (
                statements.insert_entries,
                [
                    {'sid': self._sid, 'eid': _hash(key), 'name': key, 'value': value}
                    for key, value in commit.puts.items()
                ],
            ),
            (
                statements.delete_waits,
                [
                    {'in': self._sid, 'of_trigger': _hash(trigger), 'of_instance': _hash(name)}
                    for trigger, name in commit.waits_removed
                ],
            ),
            (
                statements.insert_waits,
                [
                    {'sid': self._sid, 'tid': _hash(t), 'iid': _hash(name), 'trigger': t}
                    for t, name in commit.waits_added
                ],
            ),
        ]
        for statement, parameters in changes:
            if parameters:
                connection.execute(statement, parameters)
        self._put_passing(connection, commit)
        self._put_configuration(connection, commit)
        for name, at in commit.dues.items():
            self._put_due(connection, name, at)
        self._put_gates(connection, commit)

    def _put_gates(self, connection: sa.Connection, commit: Commit) -> None:
        for ids in _chunked(list(commit.gates)):
            connection.execute(self._statements.delete_gates, {'ids': ids})
        waiting = [
            {'gid': _hash(task_id), 'sid': self._sid, 'uid': self.uid, 'name': name}
            for task_id, name in commit.gates.items()
            if name
        ]
        if waiting:
            connection.execute(self._statements.insert_gate, waiting)

    def _put_passing(self, connection: sa.Connection, commit: Commit) -> None:
        if commit.passing is None:
            return
        now = host_time()
        name, value, seconds = commit.passing
        until = now + seconds * 1000
        connection.execute(self._statements.delete_passing, {'now': now})
        connection.execute(
            self._statements.insert_passing,
            {'sid': self._sid, 'eid': _hash(name), 'value': value, 'until': until},
        )

    def _put_configuration(self, connection: sa.Connection, commit: Commit) -> None:
        if commit.configuration is None:
            return
        digest, text = commit.configuration
        if connection.scalar(self._statements.configuration, {'digest': digest}) is None:
            connection.execute(
                self._statements.insert_configuration, {'digest': digest, 'text': text}
            )

    def _put_due(self, connection: sa.Connection, name: str, at: int) -> None:
        place = {'in': self._sid, 'of': _hash(name)}
        if not at:
            connection.execute(self._statements.delete_due, place)
        elif not connection.execute(self._statements.move_due, {**place, 'to': at}).rowcount:
            connection.execute(
                self._statements.insert_due,
                {'sid': self._sid, 'iid': _hash(name), 'uid': self.uid, 'name': name, 'at': at},
            )

    def _drop_leftover(self, connection: sa.Connection, name: str) -> None:
        """Remove the due date of an instance that does not exist in any incarnation."""
        statement = self._statements.rows
        if connection.execute(statement, {'sid': self._sid, 'ids': [_hash(name)]}).first() is None:
            self._put_due(connection, name, 0)


def _nothing_to_note(database: _Database, gap: int) -> bool:
    """Tell whether this process noted so lately that it looks that nobody need write it."""
    return 0 <= host_time() - database.noted_at < gap // 4


def _note_sweep(connection: sa.Connection, statements: Statements, now: int, gap: int) -> bool:
    """Remember that due dates are looked at now; tell whether that was done all the time."""
    found = connection.execute(statements.last_sweep).one_or_none()
    taken_at, restless = found or (None, 0)
    restless = restless_until(taken_at, restless, now, gap)
    connection.execute(statements.delete_sweep)
    connection.execute(
        statements.insert_sweep, {'id': 1, 'taken_at': now, 'restless_until': restless}
    )
    return bool(now >= restless)


def _chunked(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the hashes of names, so many at a time."""
    for start in range(0, len(names), _CHUNK):
        yield [_hash(name) for name in names[start : start + _CHUNK]]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
