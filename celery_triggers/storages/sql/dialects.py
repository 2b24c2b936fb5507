"""What differs from database to database: clocks, upserts, locks, errors, connections."""

from __future__ import annotations

import math
import random
import sqlite3
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex, DDLElement

from celery_triggers.exceptions import MissingExtra, StorageNotConfigured, StorageUnavailable
from celery_triggers.storages.records import host_time
from celery_triggers.storages.relational.database import LOCK_SECONDS, STATEMENT_SECONDS

__all__ = ['Dialect', 'MySQL', 'PostgreSQL', 'SQLite', 'dialect_of']

#: How long making a connection may take, in seconds.
CONNECT_SECONDS = 5

#: How much longer than a statement may take its answer is waited for, in seconds: a server
#: that is there says by itself that one took too long.
GRACE_SECONDS = 2


class Dialect:
    """The common part: standard SQL.

    Args:
        lock: How long a statement waits for what another transaction has locked, in seconds;
            ``None``: as long as is usual with this database.
        statement: How long one may take in all, and how long the server waits for the next
            one of an open transaction.
    """

    #: How long a statement waits for a lock, in seconds.
    lock_seconds: ClassVar[float] = LOCK_SECONDS
    #: The drivers that can be used, by their names in URLs, the usual one first.
    drivers: ClassVar[Sequence[str]]
    #: Whether a lone SELECT outside of a transaction saves round trips.
    reads_alone: ClassVar[bool] = False
    #: Whether connections must be closed before this process forks.
    closes_before_fork: ClassVar[bool] = False
    #: Whether a SELECT can lock the rows that it finds.
    locks_rows: ClassVar[bool] = True
    #: Whether keys must be looked up one by one (``LATERAL``): with all of them in a list the
    #: planner may prefer to read everything that a session has, since sessions are small on
    #: the average.
    looks_up_each: ClassVar[bool] = False

    def __init__(self, lock: float | None = None, statement: float = STATEMENT_SECONDS):
        self.lock = self.lock_seconds if lock is None else lock
        self.statement = statement

    def url(self, url: sa.URL) -> sa.URL:
        """Return the URL with the driver that is to be used.

        Raises:
            StorageNotConfigured: Nothing could be kept there.
            MissingExtra: There is no driver.
        """
        return url

    def connect(self, dialect: Any, arguments: Any, options: Any) -> Any:
        """Return a new connection of the driver's, made as SQLAlchemy's dialect does it."""
        return dialect.connect(*arguments, **options)

    def engine_options(self) -> dict[str, Any]:
        """Return what ``create_engine`` is told."""
        return {'isolation_level': 'READ COMMITTED', 'pool_timeout': CONNECT_SECONDS}

    def connect_args(self) -> dict[str, Any]:
        """Return what the driver is told when it connects."""
        return {}

    def on_connect(self, connection: Any) -> None:
        """Prepare a new connection."""

    def on_begin(self, connection: sa.Connection) -> None:
        """Begin a transaction where the driver does not do so by itself."""

    def clock(self) -> sa.ColumnElement[int]:
        """Return the wall clock, in milliseconds: not the time when the transaction began."""
        raise NotImplementedError

    def random_name(self) -> sa.ColumnElement[str]:
        """Return 32 characters of the server's that nobody else has."""
        raise NotImplementedError

    def upsert(self, table: sa.Table, *changing: str) -> Any:
        """Return the statement that inserts rows and changes those which are there.

        Args:
            changing: What is changed then; nothing: the row stays as it is.
        """
        raise NotImplementedError

    def can_repeat(self, error: DBAPIError) -> bool:
        """Tell whether the database undid the transaction for the sake of another."""
        return False

    def ready(self, statement: DDLElement) -> DDLElement:
        """Return a statement that makes a table or an index as this database knows it."""
        return statement

    def is_done(self, connection: sa.Connection, statement: DDLElement) -> bool:
        """Tell whether such a statement must not be run again."""
        return False

    def take_upgrade_lock(self, connection: sa.Connection, name: str) -> None:
        """Let one process at a time make tables; held until the transaction ends."""

    def release_upgrade_lock(self, connection: sa.Connection, name: str) -> None:
        """Give the lock back where it outlives the transaction."""


class SQLite(Dialect):
    """One file, one writer: a writing transaction has the only lock from its beginning."""

    lock_seconds = 30
    drivers = ('pysqlite',)
    closes_before_fork = True
    locks_rows = False

    def url(self, url: sa.URL) -> sa.URL:
        in_memory = url.query.get('mode') == 'memory' or ':memory:' in (url.database or '')
        if in_memory or not url.database:
            raise StorageNotConfigured(
                'an SQLite database in memory is lost to every other process; name a file: '
                'sqlite:///triggers.db'
            )
        return _with_driver(url, self.drivers, 'sql')

    def engine_options(self) -> dict[str, Any]:
        return {}

    def connect_args(self) -> dict[str, Any]:
        return {'timeout': self.lock}

    def on_connect(self, connection: Any) -> None:
        # Transactions begin where on_begin says so, not where sqlite3 guesses.
        connection.isolation_level = None
        deadline = time.monotonic() + self.lock
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

    def on_begin(self, connection: sa.Connection) -> None:
        if connection.get_execution_options().get('triggers_write'):
            connection.exec_driver_sql('BEGIN IMMEDIATE')

    def clock(self) -> sa.ColumnElement[int]:
        # The file has no clock of its own. Asked for whenever a statement is executed.
        return sa.bindparam('clock', callable_=host_time, type_=sa.BigInteger)

    def random_name(self) -> sa.ColumnElement[str]:
        return sa.literal_column('lower(hex(randomblob(16)))', sa.String)

    def upsert(self, table: sa.Table, *changing: str) -> Any:
        insert = sqlite.insert(table)
        return _on_conflict(insert, table, changing)


class PostgreSQL(Dialect):
    """PostgreSQL, by psycopg 3."""

    drivers = ('psycopg',)
    reads_alone = True
    looks_up_each = True

    def url(self, url: sa.URL) -> sa.URL:
        return _with_driver(url, self.drivers, 'postgres')

    def connect(self, dialect: Any, arguments: Any, options: Any) -> Any:
        from celery_triggers.storages.sql.psycopg import connect

        return connect(self.statement + GRACE_SECONDS, arguments, options)

    def connect_args(self) -> dict[str, Any]:
        return {
            'connect_timeout': CONNECT_SECONDS, 'tcp_user_timeout': _milliseconds(self.statement),
        }

    def on_connect(self, connection: Any) -> None:
        before, connection.autocommit = connection.autocommit, True
        lock, statement = _milliseconds(self.lock), _milliseconds(self.statement)
        with connection.cursor() as cursor:
            # A process that is stopped in the middle of a transaction must not hold up others.
            cursor.execute(
                "SELECT set_config('lock_timeout', %s, false),"
                " set_config('statement_timeout', %s, false),"
                " set_config('idle_in_transaction_session_timeout', %s, false)",
                (str(lock), str(statement), str(statement)),
            )
        connection.autocommit = before

    def clock(self) -> sa.ColumnElement[int]:
        seconds = sa.extract('epoch', sa.func.clock_timestamp())
        return sa.cast(seconds * 1000, sa.BigInteger)

    def random_name(self) -> sa.ColumnElement[str]:
        return sa.literal_column('md5(random()::text || clock_timestamp()::text)', sa.String)

    def upsert(self, table: sa.Table, *changing: str) -> Any:
        return _on_conflict(postgresql.insert(table), table, changing)

    def can_repeat(self, error: DBAPIError) -> bool:
        # A serialization failure, a deadlock.
        code = getattr(error.orig, 'sqlstate', None) or getattr(error.orig, 'pgcode', None)
        return code in ('40001', '40P01')

    def take_upgrade_lock(self, connection: sa.Connection, name: str) -> None:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(name))))


class MySQL(Dialect):
    """MariaDB and MySQL, by mysqlclient or else PyMySQL unless the URL names one of them."""

    drivers = ('mysqldb', 'pymysql')

    def url(self, url: sa.URL) -> sa.URL:
        drivers = self.drivers if find_spec('MySQLdb') is not None else self.drivers[::-1]
        return _with_driver(url, drivers, 'mysql')

    def engine_options(self) -> dict[str, Any]:
        # Every transaction is ended before its connection is given back, which would be one
        # more round trip to a driver that does not know so.
        return {**super().engine_options(), 'pool_reset_on_return': None}

    def connect_args(self) -> dict[str, Any]:
        statement = math.ceil(self.statement)
        return {
            'connect_timeout': CONNECT_SECONDS, 'read_timeout': statement,
            'write_timeout': statement, 'charset': 'utf8mb4',
        }

    def on_connect(self, connection: Any) -> None:
        lock, statement = math.ceil(self.lock), math.ceil(self.statement)
        cursor = connection.cursor()
        # The first as above: only MariaDB has it, and only MariaDB reads such a comment.
        cursor.execute(
            f'SET SESSION /*M! idle_transaction_timeout = {statement}, */'
            f' innodb_lock_wait_timeout = {lock}, lock_wait_timeout = {lock}'
        )
        cursor.close()

    def clock(self) -> sa.ColumnElement[int]:
        # Of the statement, and in no time zone: UNIX_TIMESTAMP() would go through the
        # session's, in which an hour may come twice.
        return sa.literal_column(
            "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000", sa.BigInteger
        )

    def random_name(self) -> sa.ColumnElement[str]:
        return sa.literal_column('MD5(CONCAT(UUID(), RAND()))', sa.String)

    def upsert(self, table: sa.Table, *changing: str) -> Any:
        insert = mysql.insert(table)
        names = changing or [column.name for column in table.primary_key][:1]
        values = {
            name: insert.inserted[name] if changing else table.c[name] for name in names
        }
        return insert.on_duplicate_key_update(values)

    def can_repeat(self, error: DBAPIError) -> bool:
        # A deadlock; a record that has changed since a snapshot was taken.
        return _code(error) in (1213, 1020)

    def ready(self, statement: DDLElement) -> DDLElement:
        if isinstance(statement, CreateIndex):
            # MySQL cannot make an index only if there is none.
            statement.if_not_exists = False
        return statement

    def is_done(self, connection: sa.Connection, statement: DDLElement) -> bool:
        if not isinstance(statement, CreateIndex):
            return False
        index: Any = statement.element
        known = sa.inspect(connection).get_indexes(index.table.name)
        return index.name in {one['name'] for one in known}

    def take_upgrade_lock(self, connection: sa.Connection, name: str) -> None:
        patience = math.ceil(self.lock)
        if not connection.scalar(sa.select(sa.func.get_lock(name, patience))):
            raise StorageUnavailable(
                f'another process has been making tables for {patience} seconds ({name})'
            )

    def release_upgrade_lock(self, connection: sa.Connection, name: str) -> None:
        connection.execute(sa.select(sa.func.release_lock(name)))


def _on_conflict(insert: Any, table: sa.Table, changing: Sequence[str]) -> Any:
    keys = [column.name for column in table.primary_key]
    if not changing:
        return insert.on_conflict_do_nothing(index_elements=keys)
    values = {name: insert.excluded[name] for name in changing}
    return insert.on_conflict_do_update(index_elements=keys, set_=values)


def _milliseconds(seconds: float) -> int:
    # 0 would mean that there is no limit.
    return max(1, int(seconds * 1000))


def _with_driver(url: sa.URL, drivers: Sequence[str], extra: str) -> sa.URL:
    """Return a URL with its driver, the first of these unless it names one.

    Raises:
        StorageNotConfigured: It names another.
        MissingExtra: The driver is not installed.
    """
    database, _, driver = url.drivername.partition('+')
    if not driver:
        url = url.set(drivername=f'{database}+{drivers[0]}')
    elif driver not in drivers:
        raise StorageNotConfigured(
            f'the sql storage reaches {database} by {" or ".join(drivers)}, not by {driver}; '
            f'write {database}://... or {database}+{drivers[0]}://...'
        )
    try:
        url.get_dialect().import_dbapi()
    except ImportError as exc:
        what = f'the storage {database}, by {driver or drivers[0]},'
        if driver == 'mysqldb':
            # Which has to be compiled, so no extra brings it.
            raise MissingExtra(what, '', 'mysqlclient') from exc
        raise MissingExtra(what, extra) from exc
    return url


def _code(error: DBAPIError) -> Any:
    arguments = getattr(error.orig, 'args', ())
    return arguments[0] if arguments else None


_DIALECTS: dict[str, type[Dialect]] = {
    'sqlite': SQLite, 'postgresql': PostgreSQL, 'mysql': MySQL, 'mariadb': MySQL,
}


def dialect_of(url: sa.URL, **seconds: Any) -> Dialect:
    """Return what is special about the database of a URL.

    Args:
        seconds: See :class:`Dialect`.

    Raises:
        StorageNotConfigured: Sessions cannot be kept in such a database.
    """
    name = url.get_backend_name()
    if name not in _DIALECTS:
        hint = ': write postgresql://...' if name == 'postgres' else ''
        raise StorageNotConfigured(
            f'the sql storage keeps sessions in PostgreSQL, MariaDB, MySQL and SQLite, not in '
            f'{name}{hint}'
        )
    return _DIALECTS[name](**seconds)
