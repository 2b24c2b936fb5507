"""A cache of Django's as the storage uses it: connections, refusals, and what errors mean."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from celery_triggers.exceptions import MissingExtra, StorageNotConfigured, StorageUnavailable
from celery_triggers.forks import ForkGate

try:
    from django.core.cache import InvalidCacheBackendError, caches
    from django.core.cache.backends.base import DEFAULT_TIMEOUT, InvalidCacheKey
    from django.core.cache.backends.db import DatabaseCache
    from django.core.cache.backends.dummy import DummyCache
    from django.core.cache.backends.filebased import FileBasedCache
    from django.core.cache.backends.locmem import LocMemCache
    from django.core.cache.backends.memcached import (
        BaseMemcachedCache,
        PyLibMCCache,
        PyMemcacheCache,
    )
    from django.core.cache.backends.redis import RedisCache
    from django.core.exceptions import ImproperlyConfigured
    from django.db import OperationalError, connections, router
    from django.utils import timezone
    from django.utils.module_loading import import_string
except ImportError as exc:
    raise MissingExtra('the storage backend cache (Django)', 'django') from exc

__all__ = ['CacheServer', 'aliases']

T = TypeVar('T')

#: The fewest entries that a database cache must be allowed to hold; it drops what is beyond.
#: Each change leaves one for an hour.
LEAST_ENTRIES = 100_000

#: Whose exceptions mean that a cache did not answer. Others, a time limit's say, go through.
_CLIENTS = frozenset({'django', 'redis', 'valkey', 'glide', 'pymemcache', 'bmemcached'})

#: A fork waits a little for the calls of other threads, which may hold locks of a client.
_gate = ForkGate(patience=1.0)


def aliases() -> list[str]:
    """Return the aliases of Django's caches.

    Raises:
        StorageNotConfigured: Django is not set up in this process.
    """
    return list(_settings())


def _settings() -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = caches.settings
    except (ImproperlyConfigured, ImportError) as exc:
        raise StorageNotConfigured(
            "the storage cache needs Django's settings, which this process does not have: set "
            f'DJANGO_SETTINGS_MODULE, or call django.conf.settings.configure() first ({exc})'
        ) from exc
    return found


class CacheServer:
    """One of Django's caches.

    Each thread has a connection of its own, and each forked child has new ones: a child that
    went on with its parent's would read the answers to the parent.

    Args:
        alias: Its key in Django's ``CACHES``.
        local: Whether a cache in this process's memory will do.

    Raises:
        StorageNotConfigured: There is none, or it cannot keep sessions.
    """

    def __init__(self, alias: str, *, local: bool = False):
        self.alias = alias
        self._local = local
        _ = self._connection

    # ------------------------------------------------------------------ calls

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the values of those keys that there are."""
        found: dict[str, str] = self._call('get_many', keys) if keys else {}
        return found

    def get(self, key: str) -> str | None:
        """Return a value, ``None`` if there is none."""
        found: str | None = self._call('get', key)
        return found

    def add(self, key: str, value: str, timeout: float | None) -> bool:
        """Set a value unless there is one; tell whether it was set."""
        return bool(self._changing('add', key, value, timeout))

    def set(self, key: str, value: str, timeout: float | None) -> None:
        """Set a value."""
        self._changing('set', key, value, timeout)

    def set_many(self, values: Mapping[str, str], timeout: float | None) -> None:
        """Set values."""
        if values:
            self._changing('set_many', values, timeout)

    def _changing(self, method: str, *args: Any) -> Any:
        database = _database_of(self._connection)
        if database is not None and database.in_atomic_block:
            raise StorageNotConfigured(
                f'the cache {self.alias!r} is in the database {database.alias!r}, of which a '
                'transaction is open here, and what is fired would be sent before it is '
                'committed; fire in transaction.on_commit(), or use the storage django'
            )
        return self._call(method, *args)

    def _call(self, method: str, *args: Any) -> Any:
        """Call the cache; repeat once, since a connection may have been closed.

        Raises:
            StorageUnavailable: It did not answer, or it refused.
        """
        connection = self._connection
        call: Callable[..., Any] = getattr(connection, method)
        try:
            try:
                with _gate:
                    return call(*args)
            except Exception as exc:
                if not _is_of_client(exc, connection):
                    raise
                time.sleep(0.01)
                database = _database_of(connection)
                if database is not None and not database.in_atomic_block:
                    database.close_if_unusable_or_obsolete()
                with _gate:
                    return call(*args)
        except Exception as exc:
            if not _is_of_client(exc, connection):
                raise
            size = max((len(value) for value in args[1:2]), default=0)
            what = f'did not take {size} bytes' if size else 'did not answer'
            raise StorageUnavailable(f'the cache {self.alias!r} {what}: {exc}') from exc

    # ------------------------------------------------------------ connections

    @property
    def _connection(self) -> Any:
        params = _settings().get(self.alias)
        known = _connections.known.get((self.alias, self._local))
        # Tests may change the settings.
        if known is None or known[0] is not params:
            known = _connections.known[self.alias, self._local] = params, self._connect(params)
        return known[1]

    def _connect(self, params: Mapping[str, Any] | None) -> Any:
        if params is None:
            names = ', '.join(map(repr, aliases()))
            raise StorageNotConfigured(f"Django's CACHES has no {self.alias!r}, only {names}")
        params = dict(params)
        class_name, location = params.pop('BACKEND'), params.pop('LOCATION', '')
        try:
            kind: Any = import_string(class_name)
            self._check(kind, class_name, location)
            options = params.get('OPTIONS') or {}
            if issubclass(kind, DatabaseCache):
                kind = _exact(kind)
            connection = kind(location, {**params, 'OPTIONS': _fitting(kind, options)})
            connection.validate_key(connection.make_key('key'))
        except (ImportError, InvalidCacheBackendError, InvalidCacheKey) as exc:
            raise StorageNotConfigured(
                f'the cache {self.alias!r} cannot be used: {exc}'
            ) from exc
        if isinstance(connection, DatabaseCache):
            model = connection.cache_model_class
            if router.db_for_read(model) != router.db_for_write(model):
                self._refuse(
                    class_name, 'is read from another database than it is written to, which may '
                    'lag; let DATABASE_ROUTERS name one for django_cache',
                )
        if isinstance(connection, DatabaseCache) and connection._max_entries < LEAST_ENTRIES:
            self._refuse(
                class_name,
                f'drops entries as soon as it has more than {connection._max_entries}: set '
                f"OPTIONS['MAX_ENTRIES'] to {LEAST_ENTRIES} or more",
            )
        return connection

    def _check(self, kind: type, class_name: str, location: Any) -> None:
        """Refuse a cache that cannot keep sessions."""
        if issubclass(kind, DummyCache):
            self._refuse(class_name, 'keeps nothing')
        if issubclass(kind, LocMemCache) and not self._local:
            self._refuse(
                class_name,
                "keeps everything in one process's memory, where workers would not find it; "
                "tests in one process may set triggers_storage_options = {'local': True}",
            )
        if issubclass(kind, PyLibMCCache):
            self._refuse(
                class_name,
                'answers as if there were nothing when its server does not answer in time, and '
                'sessions would be taken for deleted; use PyMemcacheCache',
            )
        if issubclass(kind, FileBasedCache):
            self._refuse(
                class_name,
                'adds a key by looking for it and then writing it, so that two processes may '
                'both add it, and changes would be lost',
            )
        if isinstance(location, str) and issubclass(kind, (BaseMemcachedCache, RedisCache)):
            location = [server for server in re.split('[;,]', location) if server]
        if isinstance(location, (list, tuple)) and len(location) > 1:
            self._refuse(
                class_name,
                'has several servers, of which some may lack what another was given: a session '
                'would be there or not, depending on who is asked; give it one LOCATION',
            )

    def _refuse(self, class_name: str, why: str) -> None:
        raise StorageNotConfigured(
            f'the cache {self.alias!r} ({class_name}) cannot keep sessions: it {why}. Name '
            "another alias of Django's CACHES (triggers_storage = 'cache://<alias>'), say of "
            'Redis, Memcached or a database'
        )


def _fitting(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a client: what hides errors off, and no endless waits."""
    if issubclass(kind, PyMemcacheCache):
        # Else its answers look for a while after an error as if no key existed.
        loud = {'ignore_exc': False, 'default_noreply': False, 'retry_attempts': 0,
                'dead_timeout': 0}
        return {'connect_timeout': 2.0, 'timeout': 5.0, **options, **loud}
    if issubclass(kind, RedisCache):
        return {'socket_connect_timeout': 2.0, 'socket_timeout': 5.0, **options}
    if any(class_.__module__.startswith('django_redis.') for class_ in kind.__mro__):
        return {'SOCKET_CONNECT_TIMEOUT': 2.0, 'SOCKET_TIMEOUT': 5.0, **options,
                'IGNORE_EXCEPTIONS': False}
    if issubclass(kind, LocMemCache):
        # 300 otherwise, of which a third goes when there are more.
        return {'MAX_ENTRIES': 10**7, **options}
    return dict(options)


def _exact(kind: Any) -> Any:
    """Return a database cache that says what it could not do, and removes nothing unseen."""

    class ExactDatabaseCache(kind):  # type: ignore[misc]
        def _base_delete_many(self, keys: Sequence[str]) -> None:
            """Leave what has expired when it was read: others may have begun it anew since."""

        def add(self, key: str, value: Any, *args: Any, **kwargs: Any) -> bool:
            """Add a key; what has expired is removed first.

            Two processes that find it expired would both replace it, and both be told that
            they have added it.
            """
            self._delete_expired(self.make_and_validate_key(key, kwargs.get('version')))
            return bool(super().add(key, value, *args, **kwargs))

        def set(
            self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: Any = None
        ) -> None:
            if not self._base_set('set', self.make_and_validate_key(key, version), value, timeout):
                raise OperationalError(f'the table {self._table} cannot be written to')

        def _delete_expired(self, key: str) -> None:
            database = _database_of(self)
            quoted = database.ops.quote_name
            now = database.ops.adapt_datetimefield_value(timezone.now().replace(microsecond=0))
            with database.cursor() as cursor:
                cursor.execute(
                    f'DELETE FROM {quoted(self._table)} WHERE {quoted("cache_key")} = %s'
                    f' AND {quoted("expires")} < %s',
                    [key, now],
                )

    return ExactDatabaseCache


def _is_of_client(exc: Exception, connection: Any) -> bool:
    if isinstance(exc, OSError):
        return True
    known = {*_CLIENTS, type(connection).__module__.partition('.')[0]}
    return any(class_.__module__.partition('.')[0] in known for class_ in type(exc).__mro__)


def _database_of(connection: Any) -> Any:
    """Return the database connection of a database cache, ``None`` for another one."""
    if not isinstance(connection, DatabaseCache):
        return None
    return connections[router.db_for_write(connection.cache_model_class)]


class _Connections(threading.local):
    """Connections of one thread, with the settings that each was made for."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, bool], tuple[Any, Any]] = {}


_connections = _Connections()


def _forget_connections() -> None:
    global _connections
    # Kept, so that nothing closes what the parent still uses.
    _of_parents.append(_connections)
    for _, connection in _connections.known.values():
        database = _database_of(connection)
        if database is not None:
            _of_parents.append(database.connection)
            database.connection = None
    _connections = _Connections()


_of_parents: list[Any] = []

os.register_at_fork(after_in_child=_forget_connections)
