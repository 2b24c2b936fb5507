"""A database of the SQL storage in this process: its engine, transactions and tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from celery_triggers.exceptions import StorageNotConfigured
from celery_triggers.forks import ForkGate
from celery_triggers.storages.base import Shared
from celery_triggers.storages.relational.database import (
    FORK_PATIENCE,
    Attempt,
    Clash,
    Database,
    Failure,
)
from celery_triggers.storages.sql.dialects import dialect_of
from celery_triggers.storages.sql.schema import LATEST, Tables, steps_after
from celery_triggers.storages.sql.statements import Statements
from celery_triggers.storages.sql.transaction import SQLTransaction

__all__ = ['MOST_PREFIX', 'SQLDatabase', 'databases', 'ddl', 'shown']

T = TypeVar('T')

#: Names of tables and indexes end after 63 bytes in PostgreSQL.
MOST_PREFIX = 40

#: What names of tables cannot hold: PostgreSQL's no null, MariaDB's nothing beyond U+FFFF,
#: and SQLAlchemy would take the last for a parameter.
_NOT_IN_NAMES = re.compile('[\x00\ud800-\udfff\U00010000-\U0010ffff]|%\\(')

#: Options of the storage that are timeouts, and what the dialects call them.
_TIMEOUTS = {'lock_timeout': 'lock', 'statement_timeout': 'statement'}

#: Options of the storage that are not SQLAlchemy's.
_OWN_OPTIONS = frozenset({'create_tables', *_TIMEOUTS})


class SQLDatabase(Database):
    """An engine with its tables, made once in each process; it connects when it must.

    Args:
        options: What ``create_engine`` takes, and

            - ``create_tables``: whether missing tables are made at the first use, which is the
              default;
            - ``lock_timeout``: how many seconds a statement waits for what another
              transaction has locked; 10 by default, with SQLite 30;
            - ``statement_timeout``: how many seconds one may take in all, and how long a
              server waits for the next one of a transaction, 30 by default.

    Attributes:
        place: The random name of this place, ``''`` as long as that is not known.
    """

    errors = (DBAPIError, PoolTimeoutError)

    def __init__(self, url: str, prefix: str, options: dict[str, Any]):
        _check_prefix(prefix)
        parsed = _parsed(url)
        self.shown = shown(parsed)
        self.dialect = dialect_of(parsed, **_timeouts(options))
        self.prefix = prefix
        self.tables = Tables(prefix)
        self.statements = Statements(self.tables, self.dialect)
        self.place = ''
        self._creates = bool(options.get('create_tables', True))
        self._connected = False
        self._connections: WeakSet[Any] = WeakSet()
        # SQLite's locks do not survive a fork, its notes of them do: a child with an open
        # connection of its parent's believes that it holds locks which it does not, and
        # then processes write over each other (sqlite.org/howtocorrupt.html, 2.6). The others
        # must not be forked while SQLAlchemy holds a lock of its own.
        self.gate = ForkGate(FORK_PATIENCE, self._before_fork)
        self.engine = self._engine(self.dialect.url(parsed), options)

    def _engine(self, url: sa.URL, options: dict[str, Any]) -> sa.Engine:
        theirs = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
        if str(theirs.get('isolation_level', '')).upper() == 'AUTOCOMMIT':
            raise StorageNotConfigured(
                'triggers_storage_options has isolation_level = AUTOCOMMIT, with which a commit '
                'could be applied in part'
            )
        known = {
            # Errors are logged, and what is stored is nobody's business there.
            'hide_parameters': True, **self.dialect.engine_options(), **theirs,
            'connect_args': {**self.dialect.connect_args(), **options.get('connect_args', {})},
        }
        try:
            engine = sa.create_engine(url, **known)
        except (TypeError, ArgumentError) as exc:
            raise StorageNotConfigured(
                f'triggers_storage_options has {sorted(options)}: {exc}'
            ) from exc
        event.listen(engine, 'do_connect', self._connect)
        event.listen(engine, 'connect', self._on_connect)
        event.listen(engine, 'begin', self.dialect.on_begin)
        return engine

    # ------------------------------------------------------------ transactions

    def known_place(self) -> str:
        """Return the random name of this place, where the tables are by then."""
        if not self.place:
            self._prepare()
        return self.place

    def run(self, body: Callable[[SQLTransaction], T], *, write: bool) -> T:
        self.known_place()
        return self._repeated(lambda c: body(SQLTransaction(c, self.statements)), write)

    def _repeated(self, body: Callable[[sa.Connection], T], write: bool) -> T:
        return self.repeated(lambda attempt: self._once(body, write, attempt))

    def judge(self, error: Any, attempt: Attempt) -> Failure:
        if not isinstance(error, DBAPIError):
            return Failure(error, undone=False, told=False, stale=False)
        undone = self.dialect.can_repeat(error)
        return Failure(
            error.orig, undone=undone, told=undone, stale=error.connection_invalidated
        )

    def _once(self, body: Callable[[sa.Connection], T], write: bool, attempt: Attempt) -> T:
        with self.gate, self.engine.connect() as connection:
            if not write and self.dialect.reads_alone:
                connection.execution_options(isolation_level='AUTOCOMMIT')
            else:
                connection.execution_options(triggers_write=write)
            try:
                result = body(connection)
                if write:
                    attempt.committing = True
                    connection.commit()
            except BaseException as exc:
                # SQLAlchemy takes a transaction for ended whose commit failed; and what
                # strikes from outside, a time limit say, may do so in the midst of an answer.
                if attempt.committing or not isinstance(exc, (Clash, DBAPIError)):
                    connection.invalidate()
                raise
            return result

    # ------------------------------------------------------------------ tables

    def _prepare(self) -> None:
        """See to it that the tables are there.

        Raises:
            StorageNotConfigured: They are missing or old, and may not be made here.
            StorageUnavailable: The database did not answer.
        """
        version, place = self._repeated(self._found, write=False)
        if version < LATEST:
            if not self._creates:
                raise StorageNotConfigured(
                    f'the tables {self.prefix}_* at {self.shown} are '
                    f'{f"of version {version}" if version else "missing"}, and create_tables is '
                    f'off; version {LATEST} is needed. The command "celery -A <app> triggers '
                    f'schema --from {version}" prints what leads there.'
                )
            place = self._repeated(self._upgrade, write=True)
        self.place = place

    def _found(self, connection: sa.Connection) -> tuple[int, str]:
        """Return the version of the tables that are there, 0 for none, and the place."""
        inspector = sa.inspect(connection)
        if inspector.has_table(self.tables.schema.name):
            schema = self.tables.schema.c
            row = connection.execute(sa.select(schema.version, schema.place)).one_or_none()
            # Without a row somebody died while making them, where that is no transaction.
            return (row.version, row.place) if row is not None else (0, '')
        # The table that the first step makes last.
        return int(inspector.has_table(self.tables.sweeps.name)), ''

    def _upgrade(self, connection: sa.Connection) -> str:
        lock = f'{self.prefix}_schema'
        self.dialect.take_upgrade_lock(connection, lock)
        try:
            # Another process may have been here while this one waited for the lock.
            version, place = self._found(connection)
            if version < LATEST:
                self._take_steps(connection, version)
                version, place = self._found(connection)
                connection.commit()
            return place
        finally:
            if not connection.invalidated:
                self.dialect.release_upgrade_lock(connection, lock)

    def _take_steps(self, connection: sa.Connection, version: int) -> None:
        for _, statements in steps_after(version, self.tables):
            for statement in map(self.dialect.ready, statements):
                if not self.dialect.is_done(connection, statement):
                    connection.execute(statement)
        connection.execute(self.noted())

    def noted(self) -> Any:
        """Return the statement that notes the version of the tables, and names the place."""
        upsert = self.dialect.upsert(self.tables.schema, 'version')
        return upsert.values(id=1, version=LATEST, place=self.dialect.random_name())

    # ------------------------------------------------------- connections, forks

    def _connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        try:
            return self.dialect.connect(dialect, arguments, options)
        except (TypeError, dialect.loaded_dbapi.ProgrammingError) as exc:
            raise StorageNotConfigured(
                f'the driver of {self.shown} does not understand all of the URL and of '
                f'connect_args: {exc}'
            ) from exc

    def _on_connect(self, connection: Any, _record: Any) -> None:
        self._connected = True
        if not self.dialect.closes_before_fork:
            self._connections.add(connection)
        self.dialect.on_connect(connection)

    def _before_fork(self) -> None:
        if self._connected and self.dialect.closes_before_fork:
            self._connected = False
            self.engine.dispose()

    def renew(self) -> None:
        """Take a new pool in a forked child; the old one's connections are the parent's."""
        if self._connected:
            self._connected = False
            for connection in self._connections:
                _let_go(connection)
            self.engine.dispose(close=False)


def _check_prefix(prefix: str) -> None:
    if _NOT_IN_NAMES.search(prefix) or not 0 < len(prefix.encode()) <= MOST_PREFIX:
        raise StorageNotConfigured(
            f'triggers_key_prefix is the beginning of the names of tables: it must have 1 to '
            f'{MOST_PREFIX} bytes, no characters beyond U+FFFF and no "%(", unlike {prefix!r}'
        )


def shown(url: sa.URL) -> str:
    """Return a URL without what nobody may read: some drivers take a password in its query."""
    return repr(url.set(query={}))


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url.removeprefix('db+'))
    except (ArgumentError, ValueError):
        # Told without its cause, which may quote the URL, and with that the password.
        parsed = None
    # A password with an @ that is not quoted ends before that one.
    if parsed is None or '@' in (parsed.host or ''):
        # Nobody knows then what of it is secret.
        scheme = ''.join(re.findall(r'^[\w+]*://', url))
        raise StorageNotConfigured(
            f'triggers_storage ({scheme}...) is no URL that SQLAlchemy understands; what is '
            'special in a user or password must be quoted (%40 for @)'
        )
    return parsed


def _timeouts(options: dict[str, Any]) -> dict[str, float]:
    """Return the timeouts among the options, as dialects take them.

    Raises:
        StorageNotConfigured: One is no number of seconds.
    """
    found = {}
    for option, name in _TIMEOUTS.items():
        seconds = options.get(option)
        if seconds is None:
            continue
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0:
            raise StorageNotConfigured(
                f'{option} in triggers_storage_options must be seconds, more than 0, not '
                f'{seconds!r}'
            )
        found[name] = seconds
    return found


def ddl(url: str, prefix: str, *, after: int = 0) -> Iterator[str]:
    """Yield the statements which make the tables, or bring them to the latest version.

    Args:
        after: The version that is there; 0: none.
    """
    database = SQLDatabase(url, prefix, {})
    # In the style of these parameters no percent sign is doubled.
    kind: Any = type(database.engine.dialect)
    dialect = kind(paramstyle='named')
    for number, statements in steps_after(after, database.tables):
        yield f'-- {number}'
        for statement in map(database.dialect.ready, statements):
            yield f'{str(statement.compile(dialect=dialect)).strip()};'
    if after < LATEST:
        noted = database.noted().compile(
            dialect=dialect, compile_kwargs={'literal_binds': True}
        )
        yield f'{noted};'


def _let_go(connection: Any) -> None:
    """Give up this process's share of a connection of its parent's.

    Some drivers take their leave of the server when a connection is forgotten, which would end
    it for the parent. And when the parent dies the server must see that at once.
    """
    with suppress(Exception):  # one that is closed has nothing to give up
        if hasattr(connection, '_force_close'):
            # What PyMySQL does with those that are forgotten: it just closes the socket.
            connection._force_close()
            return
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            os.dup2(nowhere, connection.fileno())
        finally:
            os.close(nowhere)


#: This process's databases.
databases: Shared[SQLDatabase] = Shared(SQLDatabase)
