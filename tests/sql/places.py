"""How these tests look at a database beside the storage, and at what the storage sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from celery_triggers.manager import TriggerManager
from celery_triggers.storages.sql.database import SQLDatabase
from celery_triggers.storages.sql.dialects import dialect_of
from celery_triggers.sweep import Sweep, SweepReport
from celery_triggers.testing.media import Medium
from tests.parts.waiting import eventually

__all__ = [
    'SHORT', 'Sessions', 'connected', 'database_of', 'engine_of', 'executed', 'one_connection',
    'sweep',
]

#: Options of a storage with as many connections as a test can look at.
ONE = {'pool_size': 1, 'max_overflow': 0}

#: Options of a storage that waits for nothing for long.
SHORT = {'lock_timeout': 0.3, 'statement_timeout': 1}


def engine_of(medium: Medium, **options: Any) -> sa.Engine:
    """Return an engine of another program, with the driver's own timeouts."""
    url = sa.make_url(str(medium.url))
    return sa.create_engine(dialect_of(url).url(url), **options)


@contextmanager
def connected(medium: Medium, **options: Any) -> Iterator[sa.Connection]:
    """Connect to the database as another program, for as long as the block lasts."""
    engine = engine_of(medium, **options)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def one_connection(**options: Any) -> dict[str, Any]:
    """Return settings of a storage that has one connection."""
    return {'triggers_storage_options': {**ONE, **options}}


def database_of(manager: TriggerManager) -> SQLDatabase:
    storage: Any = manager.storage
    database: SQLDatabase = storage._database
    return database


@contextmanager
def executed(*engines: sa.Engine) -> Iterator[list[tuple[str, Any]]]:
    """Note the statements that are executed, each with its parameters or the first of many."""
    found: list[tuple[str, Any]] = []

    def note(
        _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool
    ) -> None:
        found.append((statement, parameters[0] if many else parameters))

    for engine in engines:
        sa.event.listen(engine, 'before_cursor_execute', note)
    try:
        yield found
    finally:
        for engine in engines:
            sa.event.remove(engine, 'before_cursor_execute', note)


def sweep(manager: TriggerManager) -> SweepReport:
    storage = manager.storage
    return Sweep(storage.application, type(storage), storage.url).run()


class Sessions:
    """The connections of a storage, as its server sees them."""

    def __init__(self, manager: TriggerManager, outside: sa.Connection):
        self.database = database_of(manager)
        self.outside = outside
        self.is_postgresql = outside.dialect.name == 'postgresql'

    def id(self) -> int:
        """Return the server's id of the storage's one connection."""
        with self.database.engine.connect() as connection:
            return self.id_of(connection)

    def id_of(self, connection: sa.Connection) -> int:
        """Return the server's id of a connection."""
        function = 'pg_backend_pid()' if self.is_postgresql else 'connection_id()'
        return int(connection.exec_driver_sql(f'SELECT {function}').scalar_one())

    def kill(self, id_: int) -> None:
        """Let the server end a connection, and wait until it is gone."""
        kill = f'SELECT pg_terminate_backend({id_})' if self.is_postgresql else f'KILL {id_}'
        self._run(kill)
        eventually(lambda: not self.exists(id_))

    def exists(self, id_: int) -> bool:
        asked = (
            f'SELECT count(*) FROM pg_stat_activity WHERE pid = {id_}'
            if self.is_postgresql
            else f'SELECT count(*) FROM information_schema.processlist WHERE id = {id_}'
        )
        return bool(self._run(asked))

    def is_waiting(self, id_: int) -> bool:
        """Tell whether a connection waits for a lock."""
        asked = (
            f'SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = {id_}'
            if self.is_postgresql
            else 'SELECT count(*) FROM information_schema.innodb_trx'
                 f" WHERE trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = {id_}"
        )
        return bool(self._run(asked))

    def _run(self, statement: str) -> Any:
        result = self.outside.exec_driver_sql(statement)
        found = result.scalar() if result.returns_rows else None
        self.outside.rollback()
        return found
