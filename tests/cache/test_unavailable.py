"""A cache that is down says so, and what was being done can be repeated."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.test.utils import override_settings

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.cache.server import CacheServer
from celery_triggers.sweep import Sweep
from celery_triggers.testing.conformance.support import eventually, statuses
from celery_triggers.testing.media import Medium
from tests.django_settings import CACHE_PREFIX, CACHES
from tests.media import named
from tests.parts import memcached

EACH: dict[str, Any] = {'t_each': {'andEvery': 'a', 'run': 'x'}}

KINDS = {
    'redis': ('redis.RedisCache', 'redis://127.0.0.1:{port}/0'),
    'memcached': ('memcached.PyMemcacheCache', '127.0.0.1:{port}'),
}


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        yield taken.getsockname()[1]


def configured(kind: str, port: int | str, **options: Any) -> Any:
    name, location = KINDS[kind]
    cache = {
        'BACKEND': f'django.core.cache.backends.{name}',
        'LOCATION': f'unix:{port}' if isinstance(port, str) else location.format(port=port),
        'OPTIONS': options,
    }
    return override_settings(CACHES={'default': cache, 'redis': CACHES['redis']})


def manager_of(**settings: Any) -> TriggerManager:
    return Medium('cache', 'cache://default', prefix='down').manager(EACH, **settings)


@pytest.mark.parametrize('kind', KINDS)
def test_firing_into_a_cache_that_is_down(kind: str, closed_port: int):
    with configured(kind, closed_port):
        manager = manager_of()
        for _ in range(4):
            # Also those right after an error, which some clients answer by themselves.
            with pytest.raises(StorageUnavailable) as caught:
                manager.fire('a')
            assert caught.value.event_id
            assert not caught.value.outcome_unknown, 'it was reading'
            with pytest.raises(StorageUnavailable):
                _ = manager.storage.exists


@pytest.mark.parametrize('options', [{'ignore_exc': True}, {'default_noreply': True}, {}])
def test_a_client_that_is_told_to_hide_errors_shows_them_all_the_same(
    closed_port: int, options: dict[str, Any]
):
    with configured('memcached', closed_port, **options):
        server = CacheServer('default')
        for _ in range(3):
            with pytest.raises(StorageUnavailable):
                server.get('key')
            with pytest.raises(StorageUnavailable):
                server.add('key', 'value', 5)


@pytest.mark.skipif(bool(memcached.missing()), reason=memcached.missing())
def test_a_memcached_that_comes_back_is_used_at_once(tmp_path: Path):
    path = str(tmp_path / 'socket')
    with configured('memcached', path):
        manager = manager_of()
        with pytest.raises(StorageUnavailable):
            manager.fire('a')
        server = memcached.run(['-s', path])
        try:
            eventually(lambda: memcached.listens(path))
            manager.fire('a')
            assert statuses(manager) == {'t_each#0': 'scheduled'}
        finally:
            memcached.end(server)
        with pytest.raises(StorageUnavailable):
            manager.fire('a')


def test_a_session_that_outgrows_memcached_is_refused_and_stays_as_it_was(
    cache_medium: Medium
):
    if cache_medium.name != 'cache-memcached':
        pytest.skip('Redis takes up to 512 MB')
    manager = cache_medium.manager(EACH)
    manager.fire('a')
    with pytest.raises(StorageUnavailable, match=r'did not take \d{7} bytes'):
        manager.fire('a', {'text': 'x' * 1_100_000})
    assert statuses(manager) == {'t_each#0': 'scheduled'}
    manager.fire('a', {'text': 'small'})
    assert len(statuses(manager)) == 2


@pytest.mark.parametrize('down', ['the own', 'another'])
def test_a_cache_that_is_down_holds_up_the_sweep_of_no_other(closed_port: int, down: str):
    own = 'cache://redis' if down == 'another' else 'cache://default'
    settings = {'triggers_storage': own, 'triggers_dispatch_grace': 0.1}
    medium = Medium('cache', 'cache://redis', prefix=CACHE_PREFIX, settings=settings)
    with configured('memcached', closed_port):
        application = medium.application(EACH)
        manager = medium.manager(application)
        manager.fire('a')

        def sent() -> int:
            try:
                return Sweep(application, medium.storage_class, own).run().sent
            except StorageUnavailable:
                assert down == 'the own'
                return 0

        try:
            assert eventually(sent) == 1
        finally:
            replace(named('cache-redis'), prefix=CACHE_PREFIX).clear()


def test_a_sweep_of_a_cache_that_is_down_says_so(closed_port: int):
    with configured('memcached', closed_port):
        manager = manager_of()
        with pytest.raises(StorageUnavailable):
            Sweep(manager.storage.application, type(manager.storage), 'cache://default').run()
