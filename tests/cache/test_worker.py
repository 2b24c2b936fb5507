"""A real worker changes sessions in the very caches that they were fired into."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_triggers.storages import CacheStorageBackend
from celery_triggers.testing.conformance.support import eventually
from celery_triggers.wiring import services_of
from tests.parts.processes import end
from tests.parts.servers import BROKER_DB, CONFORMANCE_DB, redis_url

#: The alias, and the timeout; the settings name redis, for 300 seconds.
PLACES: dict[str, tuple[str | None, Any]] = {
    'of the settings': (None, 300),
    'another, for good': ('default', None),
    'another, for two hours': ('default', 7200),
    'the same, for two hours': ('redis', 7200),
}


@pytest.fixture(scope='module')
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The application, with a worker of two processes."""
    name = os.environ['TRIGGERS_TEST_CACHE_APP'] = f'test-{secrets.token_hex(6)}'
    sys.modules.pop('tests.cache.worker_app', None)
    from tests.cache.worker_app import app

    log = tmp_path_factory.mktemp('worker') / 'log'
    command = [
        sys.executable, '-m', 'celery', '-A', 'tests.cache.worker_app', 'worker',
        '--concurrency', '2', '--loglevel', 'INFO', '--hostname', f'{name}@test',
        '--without-gossip', '--without-mingle', '--without-heartbeat',
    ]
    with log.open('wb') as out:
        worker = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, 'C_FORCE_ROOT': '1'}, start_new_session=True,
        )
    try:
        eventually(lambda: f'{name}@test ready.' in log.read_text(), 'the worker is ready')
        yield app
    finally:
        end(worker)
        app.close()
        print(log.read_text()[-5000:])
        for database in (BROKER_DB, CONFORMANCE_DB):
            with redis.Redis.from_url(redis_url(database)) as client:
                for key in client.scan_iter(f'*{name}*', count=1000):
                    client.delete(key)
        del os.environ['TRIGGERS_TEST_CACHE_APP']


def manager_at(app: Any, place: str) -> Any:
    alias, timeout = PLACES[place]
    uid = f'order:{secrets.token_hex(4)}'
    if alias is None:
        return app.triggers.session(uid)
    storage = CacheStorageBackend(uid, alias, timeout, application=app.triggers)
    return app.triggers.session(uid, storage=storage)


def seconds_left(storage: Any) -> int | None:
    """Return for how long Redis keeps the newest version of a session; ``None``: for good."""
    versions = storage._versions
    name = storage._index.session(storage.uid)
    [(_, version)] = versions.load([name])
    pointer = versions.pointer(name)
    with redis.Redis.from_url(redis_url(CONFORMANCE_DB)) as client:
        keys = client.scan_iter(f'*:{pointer}:{version.chain}:{version.number}')
        times = {client.ttl(key) for key in [*keys, *client.scan_iter(f'*:{pointer}')]}
    assert len(times) <= 2
    return None if times == {-1} else min(times)


@pytest.mark.parametrize('place', PLACES)
def test_a_session_stays_where_it_is_and_for_how_long(app: Any, place: str):
    """Two tasks and a firing of one later."""
    manager = manager_at(app, place)
    timeout = PLACES[place][1]
    manager.fire('go')
    storage = manager.storage
    result = eventually(lambda: 't_second#0' in storage and storage['t_second#0'].result)
    assert result['told by'] == 't_first#0'
    assert result['pid'] != os.getpid()
    left = seconds_left(storage)
    assert left is None if timeout is None else timeout - 60 < left <= timeout
    assert services_of(app).storage(storage.uid).exists == (storage.elsewhere is None)
    assert list(app.triggers.sessions(storage.uid)) == [storage.uid] * (storage.elsewhere is None)


@pytest.mark.parametrize('place', PLACES)
def test_a_worker_sends_what_was_not_sent_and_keeps_to_the_timeout(
    app: Any, place: str, monkeypatch: pytest.MonkeyPatch
):
    """As after the death of the process that fired."""
    manager = manager_at(app, place)
    timeout = PLACES[place][1]
    with monkeypatch.context() as dead:
        dead.setattr(services_of(app)._dispatcher, 'dispatch', lambda releases: 0)
        manager.fire('go')
    storage = manager.storage
    eventually(lambda: 't_second#0' in storage and storage['t_second#0'].result)
    left = seconds_left(storage)
    assert left is None if timeout is None else timeout - 60 < left <= timeout


def test_a_message_that_names_a_cache_that_is_not_there_runs_nothing(app: Any):
    manager = manager_at(app, 'another, for good')
    manager.fire('nothing')
    header = {
        'uid': 'order:x', 'manager': 'default', 'storage': 'cache', 'place': 'cache://nowhere',
        'incarnation': 'i', 'instance': 't_first#0', 'task_id': 'x', 'attempt': 0,
    }
    with pytest.raises(Exception, match="CACHES has no 'nowhere'"):
        services_of(app).delivery(header, 'token')
    with pytest.raises(Exception, match='workers look for sessions in'):
        services_of(app).delivery({**header, 'storage': 'redis', 'place': 'redis://x'}, 'token')
