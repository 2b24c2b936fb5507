"""A cache in a database, whose rows Django replaces and removes without looking again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, connections
from django.utils import timezone

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.cache.server import CacheServer
from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.media import Medium

TABLE = 'triggers_test_cache'


@pytest.fixture
def key() -> Iterator[str]:
    call_command('createcachetable', TABLE, verbosity=0)
    key = f'test-{secrets.token_hex(6)}'
    yield key
    with connection.cursor() as cursor:
        cursor.execute(f'DELETE FROM {TABLE} WHERE cache_key LIKE %s', [f'%{key}%'])


def expire(key: str) -> None:
    """Let a minute pass for a key."""
    past = connection.ops.adapt_datetimefield_value(timezone.now() - timedelta(minutes=1))
    with connection.cursor() as cursor:
        cursor.execute(
            f'UPDATE {TABLE} SET expires = %s WHERE cache_key LIKE %s', [past, f'%{key}%']
        )


def rows(key: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT COUNT(*) FROM {TABLE} WHERE cache_key LIKE %s', [f'%{key}%'])
        return int(cursor.fetchone()[0])


def test_reading_removes_nothing_that_may_have_begun_anew(key: str):
    cache = CacheServer('database')
    assert cache.add(key, 'old', 60)
    expire(key)
    assert (cache.get(key), cache.get_many([key])) == (None, {})
    assert rows(key) == 1


def test_one_process_alone_adds_what_has_expired(key: str):
    def add(value: str) -> bool:
        try:
            return CacheServer('database').add(key, value, 60)
        finally:
            connections.close_all()

    for round_ in range(10):
        CacheServer('database').set(key, 'old', 60)
        expire(key)
        with ThreadPoolExecutor(4) as pool:
            added = list(pool.map(add, [f'{round_} {number}' for number in range(4)]))
        assert sum(added) == 1
        assert CacheServer('database').get(key) == f'{round_} {added.index(True)}'


def test_what_was_not_set_is_told(key: str, monkeypatch: pytest.MonkeyPatch):
    """Django answers an error of the database with a False that it throws away."""
    cache = CacheServer('database')
    cache.set(key, 'old', 60)

    def fail(*args: Any, **kwargs: Any) -> bool:
        return False

    monkeypatch.setattr(type(cache._connection), '_base_set', fail)
    with pytest.raises(StorageUnavailable, match='cannot be written to'):
        cache.set(key, 'new', 60)
    assert cache.get(key) == 'old'


def test_sessions_are_kept_in_a_database(key: str):
    """Also by threads that fire into one at the same time."""
    medium = Medium('cache', 'cache://database', prefix=key)

    def fire(number: int) -> list[str]:
        try:
            manager = medium.manager({'t_each': {'andEvery': 'a', 'run': 'x'}}, f'order:{key}')
            return list(manager.fire('a', {'n': number}).released)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as pool:
        released = [name for names in pool.map(fire, range(12)) for name in names]
    assert sorted(released) == sorted(f't_each#{number}' for number in range(12))
    manager = medium.manager({}, f'order:{key}')
    assert len(statuses(manager)) == 12
    assert medium.uids(f'order:{key}') == [f'order:{key}']
    assert manager.storage.delete()
