"""Caches that cannot keep sessions are refused, with what to do instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction
from django.test.utils import override_settings

from celery_triggers.exceptions import MissingExtra, StorageNotConfigured
from celery_triggers.storages.cache import CacheStorageBackend
from celery_triggers.storages.cache import backend as cache
from celery_triggers.testing.media import FakeApplication

BACKENDS = 'django.core.cache.backends'


@contextmanager
def caches(**options: Any) -> Iterator[None]:
    with override_settings(CACHES={'default': options}):
        yield


def backend(
    cache: str | None = None, *options: Any, storage: str = 'cache', **settings: Any
) -> CacheStorageBackend:
    application = FakeApplication(triggers_storage=storage, **settings)
    return CacheStorageBackend('order:1', cache, *options, application=application)


def test_memory_of_one_process_is_refused_unless_a_test_asks_for_it():
    with caches(BACKEND=f'{BACKENDS}.locmem.LocMemCache'):
        with pytest.raises(StorageNotConfigured) as caught:
            backend()
        for part in ("'default'", 'LocMemCache', 'one process', 'cache://<alias>', "'local'"):
            assert part in str(caught.value)
        assert not backend(triggers_storage_options={'local': True}).exists
        with pytest.raises(StorageNotConfigured):
            backend()


def test_what_django_has_when_nothing_is_configured_is_refused():
    from django.conf import global_settings

    with override_settings(CACHES=global_settings.CACHES):
        with pytest.raises(StorageNotConfigured, match='LocMemCache'):
            backend()


def test_memory_of_a_test_holds_more_than_a_few_hundred_keys():
    with caches(BACKEND=f'{BACKENDS}.locmem.LocMemCache', LOCATION='many'):
        found = backend(triggers_storage_options={'local': True})
        for number in range(400):
            assert found.save_document(f'd{number}', 'x', None)
        assert all(found.load_document(f'd{number}')[0] == 'x' for number in range(400))


@pytest.mark.parametrize('local', ['0', 'false', 'No'])
def test_a_url_that_does_not_want_memory_is_understood(local: str):
    with caches(BACKEND=f'{BACKENDS}.locmem.LocMemCache'):
        with pytest.raises(StorageNotConfigured, match='one process'):
            backend(storage=f'cache://default?local={local}')


def test_a_client_that_hides_its_timeouts_is_refused():
    with caches(BACKEND=f'{BACKENDS}.memcached.PyLibMCCache', LOCATION='127.0.0.1:1'):
        with pytest.raises(StorageNotConfigured, match='use PyMemcacheCache'):
            backend()


def test_a_prefix_that_memcached_does_not_take_is_no_outage():
    options = {'BACKEND': f'{BACKENDS}.memcached.PyMemcacheCache', 'LOCATION': '127.0.0.1:1'}
    with caches(**options, KEY_PREFIX='my shop'):
        with pytest.raises(StorageNotConfigured, match='my shop'):
            backend()


class Replicas:
    """A router that reads elsewhere than it writes."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return 'postgresql' if model._meta.app_label == 'django_cache' else None

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return 'default' if model._meta.app_label == 'django_cache' else None


def test_a_database_that_is_read_elsewhere_is_refused():
    options = {'BACKEND': f'{BACKENDS}.db.DatabaseCache', 'LOCATION': 'x'}
    with override_settings(DATABASE_ROUTERS=[f'{__name__}.Replicas']):
        with caches(**options, OPTIONS={'MAX_ENTRIES': 10**6}):
            with pytest.raises(StorageNotConfigured, match='another database'):
                backend()


@pytest.mark.parametrize(('timeout', 'again', 'warns'), [
    (3600, 3600, True), (7200, 3600, True), (3600, 600, False), (None, 3600, False),
])
def test_a_timeout_that_is_too_short_to_send_again_is_warned_of(
    timeout: float | None, again: float, warns: bool, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cache, '_warned', set())
    for _ in range(2):
        backend('redis', timeout, triggers_redeliver_after=again)
    said = [record for record in caplog.records if 'triggers_redeliver_after' in record.message]
    assert len(said) == warns


def test_a_dummy_is_always_refused():
    with caches(BACKEND=f'{BACKENDS}.dummy.DummyCache'):
        with pytest.raises(StorageNotConfigured, match='keeps nothing'):
            backend(triggers_storage_options={'local': True})


def test_files_are_refused_since_two_processes_may_add_a_key(tmp_path: Path):
    with caches(BACKEND=f'{BACKENDS}.filebased.FileBasedCache', LOCATION=str(tmp_path)):
        with pytest.raises(StorageNotConfigured, match='both add it'):
            backend()


@pytest.mark.parametrize('kind', ['redis.RedisCache', 'memcached.PyMemcacheCache'])
@pytest.mark.parametrize('location', [['redis://a', 'redis://b'], 'redis://a,redis://b'])
def test_several_servers_are_refused(kind: str, location: Any):
    with caches(BACKEND=f'{BACKENDS}.{kind}', LOCATION=location):
        with pytest.raises(StorageNotConfigured, match='several servers'):
            backend()


def test_a_database_that_drops_entries_is_refused():
    with caches(BACKEND=f'{BACKENDS}.db.DatabaseCache', LOCATION='x'):
        with pytest.raises(StorageNotConfigured, match='MAX_ENTRIES'):
            backend()


def test_a_change_within_a_transaction_of_a_database_cache_is_refused():
    found = backend('database')
    with transaction.atomic():
        with pytest.raises(StorageNotConfigured, match='on_commit'):
            found.save_document('d', 'x', None)


def test_an_alias_that_does_not_exist_is_refused():
    with pytest.raises(StorageNotConfigured, match="'nowhere', only 'default'"):
        backend('nowhere')


def test_a_client_that_is_not_installed_is_an_error_that_says_so():
    with caches(BACKEND='nothing.of.the.kind.Cache'):
        with pytest.raises(StorageNotConfigured, match='No module named'):
            backend()


@pytest.mark.parametrize('timeout', [0, -1, 0.5, True, 'soon'])
def test_a_timeout_that_is_none_is_refused(timeout: Any):
    with pytest.raises(StorageNotConfigured, match='seconds, from 1 to'):
        backend('redis', timeout)


@pytest.mark.parametrize('url', ['cache://redis?timeout=soon', 'cache://redis?timeout=0'])
def test_a_timeout_in_a_url_that_is_none_is_refused(url: str):
    with pytest.raises(StorageNotConfigured, match='seconds, from 1 to'):
        backend(storage=url)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(StorageNotConfigured, match='no option expires'):
        backend(storage='cache://redis?expires=5')
    with pytest.raises(StorageNotConfigured, match='no option socket_timeout'):
        backend('redis', triggers_storage_options={'socket_timeout': 5})


@pytest.mark.parametrize(
    ('storage', 'options', 'arguments', 'wanted'),
    [
        ('cache', {}, (), '3600'),
        ('cache://redis', {}, (), '3600'),
        ('cache://redis?timeout=7200', {}, (), '7200'),
        ('cache://redis?timeout=1.5', {}, (), '2'),
        ('cache://redis?timeout=none', {}, (), 'none'),
        ('cache', {'timeout': None}, (), 'none'),
        ('cache', {'timeout': 10}, ('redis',), '10'),
        ('cache://redis?timeout=7200', {'timeout': 10}, (), '7200'),
        ('cache://redis?timeout=7200', {'timeout': 10}, ('redis', None), 'none'),
    ],
)
def test_where_the_timeout_comes_from(
    storage: str, options: Any, arguments: Any, wanted: str
):
    found = backend(*arguments, storage=storage, triggers_storage_options=options)
    assert found._timeout == wanted


def test_a_message_names_the_cache_only_if_it_is_another_one():
    assert backend().elsewhere is None
    assert backend(storage='cache://redis?timeout=5').elsewhere is None
    assert backend('redis', None, storage='cache://redis?timeout=5').elsewhere is None
    assert backend('redis').elsewhere == 'cache://redis'


def _run(program: str) -> str:
    command = [sys.executable, '-c', program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def test_a_process_without_djangos_settings_is_told_so():
    printed = _run(
        'from celery_triggers.exceptions import StorageNotConfigured\n'
        'from celery_triggers.storages import CacheStorageBackend\n'
        'try:\n'
        "    CacheStorageBackend('order:1')\n"
        'except StorageNotConfigured as error:\n'
        '    print(error)\n'
    )
    assert 'DJANGO_SETTINGS_MODULE' in printed


def test_without_django_the_extra_is_named():
    printed = _run(
        'import sys\n'
        "sys.modules['django'] = None\n"
        'from celery_triggers.exceptions import MissingExtra\n'
        'try:\n'
        '    from celery_triggers.storages import CacheStorageBackend\n'
        'except MissingExtra as error:\n'
        '    print(error)\n'
    )
    assert "pip install 'celery_triggers[django]'" in printed
    assert issubclass(MissingExtra, ImportError)
