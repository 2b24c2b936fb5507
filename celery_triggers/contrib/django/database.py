"""A database of a Django project as the storage uses it: transactions, errors, forks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

from django.db import Error, connections, transaction

from celery_triggers.contrib.django.models import MOST_PREFIX, Sweep
from celery_triggers.contrib.django.transaction import DjangoTransaction
from celery_triggers.exceptions import StorageNotConfigured, TriggersError
from celery_triggers.forks import ForkGate
from celery_triggers.storages.base import Shared
from celery_triggers.storages.relational.backend import key
from celery_triggers.storages.relational.database import (
    FORK_PATIENCE,
    LOCK_SECONDS,
    STATEMENT_SECONDS,
    Attempt,
    Database,
    Failure,
)

__all__ = ['DjangoDatabase', 'alias_of', 'databases']

T = TypeVar('T')

SCHEME = 'django://'

#: For how many seconds a thread of ours keeps a connection at least: nobody ends requests
#: there, and with ``CONN_MAX_AGE = 0`` each statement would have one of its own.
LEAST_AGE = 60

#: What threads of this package are called.
_OWN_THREADS = 'celery_triggers-'


def alias_of(url: str | None) -> str:
    """Return the alias in ``django://<alias>``."""
    return (url or '').removeprefix(SCHEME).strip('/') or 'default'


class DjangoDatabase(Database):
    """The tables of one prefix under one alias.

    Args:
        options: ``triggers_storage_options``; there are none.
    """

    errors = (Error,)

    def __init__(self, alias: str, prefix: str, options: Mapping[str, Any]):
        if alias not in list(connections):
            raise StorageNotConfigured(
                f'triggers_storage names the database {alias!r}, and DATABASES has no such '
                f'alias; it has: {", ".join(connections)}'
            )
        if options:
            raise StorageNotConfigured(
                f'the storage django has no options, and triggers_storage_options has some '
                f'({", ".join(options)}); those of a database stand in DATABASES'
            )
        if len(prefix) > MOST_PREFIX:
            raise StorageNotConfigured(
                f'triggers_key_prefix must have at most {MOST_PREFIX} characters with the '
                f'storage django, not {len(prefix)}'
            )
        self.alias = alias
        self.shown = repr(alias)
        self.prefix = prefix
        # SQLite's locks do not survive a fork, its notes of them do: a child with an open
        # connection of its parent's believes that it holds locks which it does not, and
        # then processes write over each other (sqlite.org/howtocorrupt.html, 2.6).
        self.gate: AbstractContextManager[None] = nullcontext()
        if self.connection.vendor == 'sqlite':
            self.gate = ForkGate(FORK_PATIENCE, self._before_fork)
        self._of_threads: WeakSet[Any] = WeakSet()
        # Of all aliases and threads; only newer Djangos have them.
        self._pools: dict[str, Any] = getattr(self.connection, '_connection_pools', {})

    @property
    def connection(self) -> Any:
        """This thread's connection."""
        return connections[self.alias]

    @property
    def takes_part(self) -> bool:
        """Whether a change now is part of a transaction of the application's."""
        return bool(self.connection.in_atomic_block)

    def sid(self, uid: str) -> str:
        """Return the key of a session."""
        return key(key(self.prefix) + uid)

    # ------------------------------------------------------------ transactions

    def run(self, body: Callable[[DjangoTransaction], T], *, write: bool) -> T:
        if self.takes_part:
            return self._within(body, write)
        with self.gate:
            self._renew_in_own_thread()
            return self.repeated(lambda attempt: self._once(body, write, attempt))

    def _within(self, body: Callable[[DjangoTransaction], T], write: bool) -> T:
        """Take part in the application's transaction, whose errors are the application's."""
        try:
            with transaction.atomic(self.alias) if write else nullcontext():
                return body(DjangoTransaction(self.alias, self.prefix))
        except Error as exc:
            if _lacks_tables(exc):
                raise self._not_migrated() from exc
            raise

    def judge(self, error: Any, attempt: Attempt) -> Failure:
        if _lacks_tables(error):
            raise self._not_migrated() from error
        undone = _can_repeat(error)
        return Failure(
            error,
            undone=undone,
            # SQLite tells of a commit that failed, and has not made it then.
            told=undone or self.connection.vendor == 'sqlite',
            stale=attempt.connection is not None and self._lost(attempt.connection),
        )

    def _once(
        self, body: Callable[[DjangoTransaction], T], write: bool, attempt: Attempt
    ) -> T:
        attempt.connection = self.connection.connection
        if not write:
            # What is read is read by one statement: BEGIN and COMMIT would be two more.
            return body(DjangoTransaction(self.alias, self.prefix))
        if not self.connection.get_autocommit():
            raise TriggersError(
                f'autocommit is off for the database {self.alias!r}, so nobody could tell when '
                'a change of a session is committed; use transaction.atomic()'
            )
        with transaction.atomic(self.alias):
            self._begin()
            result = body(DjangoTransaction(self.alias, self.prefix))
            attempt.committing = True
        return result

    def _begin(self) -> None:
        """Begin a transaction of our own that writes.

        In PostgreSQL it gets its timeouts: one statement more, but the application's own
        statements on this connection keep theirs. MySQL has one by itself, SQLite that of
        the connection; there a transaction that begins by reading fails if somebody has
        written before it does.
        """
        connection = self.connection
        if connection.vendor == 'postgresql':
            limits = (LOCK_SECONDS, STATEMENT_SECONDS, STATEMENT_SECONDS)
            with connection.cursor() as cursor:
                # A process that stops in the middle of a transaction must not hold up others.
                cursor.execute(
                    "SELECT set_config('lock_timeout', %s, true),"
                    " set_config('statement_timeout', %s, true),"
                    " set_config('idle_in_transaction_session_timeout', %s, true)",
                    [f'{seconds * 1000:.0f}ms' for seconds in limits],
                )
        elif connection.vendor == 'sqlite':
            Sweep.objects.using(self.alias).filter(prefix='').update(taken_at=0)

    def _lost(self, before: Any) -> bool:
        """Tell whether the connection that was there is of no use any more."""
        connection = self.connection
        if connection.connection is not before:
            # Django has dropped it.
            return True
        if connection.is_usable():
            return False
        connection.close()
        return True

    def _not_migrated(self) -> StorageNotConfigured:
        more = '' if self.alias == 'default' else f' --database {self.alias}'
        return StorageNotConfigured(
            f'the tables of celery_triggers in the database {self.alias!r} are missing or old: '
            f'run manage.py migrate celery_triggers{more}'
        )

    # ------------------------------------------------------------- connections

    def _renew_in_own_thread(self) -> None:
        """Close a connection of a thread of ours that is too old, as requests do elsewhere."""
        if not threading.current_thread().name.startswith(_OWN_THREADS):
            return
        connection = self.connection
        self._of_threads.add(connection)
        most = connection.settings_dict['CONN_MAX_AGE']
        if connection.connection is None or connection.close_at is None or most is None:
            return
        if time.monotonic() >= connection.close_at - most + max(most, LEAST_AGE):
            connection.close()

    def _before_fork(self) -> None:
        """Close SQLite's connections that nobody uses now: this thread's, and our threads'."""
        for connection in {*self._of_threads, *_open_here(self.alias)}:
            if not connection.in_atomic_block:
                connection.inc_thread_sharing()
                connection.close()
                connection.dec_thread_sharing()

    def renew(self) -> None:
        """Take a new connection in a forked child: the open one is its parent's."""
        # Kept, since a driver might take its leave of the server when it is forgotten.
        _of_parents.append(self._pools.pop(self.alias, None))
        for connection in _open_here(self.alias):
            _of_parents.append(connection)
            del connections[self.alias]


def _open_here(alias: str) -> Iterator[Any]:
    for connection in connections.all(initialized_only=True):
        if connection.alias == alias and connection.connection is not None:
            yield connection


#: PostgreSQL: a serialization failure, a deadlock. MySQL: a deadlock; a record that has changed
#: since a snapshot was taken.
_UNDONE = frozenset({'40001', '40P01', 1213, 1020})

#: PostgreSQL's and MySQL's: no such table, no such column.
_MISSING = frozenset({'42P01', '42703', 1146, 1054})


def _can_repeat(error: Error) -> bool:
    """Tell whether the database undid a transaction for the sake of another."""
    return not _UNDONE.isdisjoint(_codes(error))


def _lacks_tables(error: Error) -> bool:
    """Tell whether a statement failed since a table or a column is not there."""
    in_sqlite = str(error).startswith(('no such table', 'no such column', 'table celery_triggers'))
    return in_sqlite or not _MISSING.isdisjoint(_codes(error))


def _codes(error: Error) -> set[Any]:
    """Return what a database and its driver call an error."""
    driver = error.__cause__
    return {getattr(driver, 'sqlstate', None), getattr(driver, 'pgcode', None), *error.args[:1]}


_of_parents: list[Any] = []

#: This process's databases.
databases: Shared[DjangoDatabase] = Shared(DjangoDatabase)
