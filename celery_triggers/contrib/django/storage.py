"""Sessions in a Django project's database, by the ORM: any alias of ``DATABASES``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_triggers.contrib.django.ready import ensure_ready
from celery_triggers.exceptions import InvalidFiring
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.records import StoredFiring
from celery_triggers.storages.relational.backend import RelationalStorageBackend, kept

ensure_ready()

from django.db import transaction  # noqa: E402

from celery_triggers.contrib.django.database import (  # noqa: E402
    DjangoDatabase,
    alias_of,
    databases,
)
from celery_triggers.contrib.django.transaction import DjangoTransaction  # noqa: E402

__all__ = ['DjangoStorageBackend']


@storage_backends.register('django')
class DjangoStorageBackend(RelationalStorageBackend):
    """Keeps a session in the tables of this package's Django application.

    ``triggers_storage`` is ``'django'``, or ``'django://<alias>'`` for another database than
    ``default``. Whatever changes within ``transaction.atomic()`` on the same alias is part of
    that transaction.
    """

    key = 'django'
    default_url = 'django://default'
    _database: DjangoDatabase

    def _open(self) -> None:
        database = databases.get(
            alias_of(self.url), self.settings.key_prefix, options=self.options
        )
        self._open_in(database)
        self._sid = database.sid(self.uid)

    @classmethod
    def _database_at(cls, url: str | None, settings: Settings) -> DjangoDatabase:
        return databases.get(
            alias_of(url), settings.key_prefix, options=settings.storage_options
        )

    @property
    def alias(self) -> str:
        """The alias of the database."""
        return self._database.alias

    def takes_part(self, connection: Any = None) -> bool:
        if connection not in (None, self.alias):
            raise InvalidFiring(
                f'a firing can be part of a transaction on the alias {self.alias!r}, where its '
                f'session is, not of {connection!r}',
                uid=self.uid,
            )
        return self._database.takes_part

    def store_firing(
        self, firing: StoredFiring, connection: Any, then: Callable[[], object]
    ) -> int:
        body = self._firing_body(firing)

        def put(t: DjangoTransaction) -> int:
            return t.put_in_inbox(firing.id, self._sid, kept(self.uid), body)

        # A savepoint would be two statements more, and protect nothing.
        now: int = self._database.run(put, write=False)
        # What could not be applied is still in the inbox, and the sweep sees to it.
        transaction.on_commit(then, using=self.alias, robust=True)
        return now

    def after_commit(self, call: Callable[[], object]) -> None:
        if self._database.takes_part:
            transaction.on_commit(call, using=self.alias, robust=True)
        else:
            call()
