"""Sessions in an SQL database, by SQLAlchemy Core. SQLite is the embedded default.

A read is one statement, a commit one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_triggers.exceptions import MissingExtra
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.records import StoredFiring
from celery_triggers.storages.relational.backend import RelationalStorageBackend, kept

try:
    from celery_triggers.storages.sql.app_transaction import (
        check_place,
        connection_of,
        when_committed,
    )
    from celery_triggers.storages.sql.database import SQLDatabase, databases
    from celery_triggers.storages.sql.transaction import SQLTransaction
except ImportError as exc:
    raise MissingExtra('the storage backend sql (SQLAlchemy)', 'sql') from exc

__all__ = ['SQLStorageBackend']


@storage_backends.register('sql')
class SQLStorageBackend(RelationalStorageBackend):
    """Keeps a session in PostgreSQL, MariaDB, MySQL or SQLite; several processes share it."""

    key = 'sql'
    default_url = 'sqlite:///triggers.db'
    _database: SQLDatabase

    def _open(self) -> None:
        assert self.url is not None
        self._open_in(databases.get(self.url, self.settings.key_prefix, options=self.options))

    @classmethod
    def _database_at(cls, url: str | None, settings: Settings) -> SQLDatabase:
        return databases.get(
            url or cls.default_url, settings.key_prefix, options=settings.storage_options
        )

    def takes_part(self, connection: Any = None) -> bool:
        return connection is not None

    def store_firing(
        self, firing: StoredFiring, connection: Any, then: Callable[[], object]
    ) -> int:
        outside = connection_of(connection, self.uid, firing.trigger)
        check_place(outside, self._database, self.uid, firing.trigger)
        transaction = SQLTransaction(outside, self._database.statements)
        now = transaction.put_in_inbox(
            firing.id, self._sid, kept(self.uid), self._firing_body(firing)
        )
        when_committed(outside, then)
        return now
