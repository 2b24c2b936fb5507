"""Real parts: brokers, storages, and workers started by the ``celery`` command."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import integration_app
import kombu
import pytest
import redis
from integration_support import HERE, Worker, unavailable

from tests.parts.servers import AMQP, BROKER_DB, STORAGE_DB, redis_url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Celery warns about the task option queue=, which is passed on as it is.
    ignore = pytest.mark.filterwarnings(r"ignore:\s*The 'queue' task attribute")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(ignore)


@pytest.fixture(scope='session')
def redis_server() -> str:
    """The URL of the database for storage, results and journals."""
    try:
        with redis.Redis.from_url(redis_url(STORAGE_DB), socket_connect_timeout=2) as client:
            client.ping()
    except redis.RedisError as exc:
        unavailable('Redis', exc)
    return redis_url(STORAGE_DB)


@pytest.fixture(scope='session', params=['redis', 'rabbitmq'])
def broker(request: pytest.FixtureRequest) -> str:
    if request.param == 'redis':
        return redis_url(BROKER_DB)
    try:
        with kombu.Connection(AMQP, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1)
    except Exception as exc:
        unavailable('RabbitMQ', exc)
    return AMQP


@pytest.fixture(scope='session')
def start_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Start workers; each is ended when the tests are over, also if one has failed."""
    started: list[Worker] = []

    def start(broker: str, *arguments: str, **settings: Any) -> Worker:
        name = f'triggers-{uuid.uuid4().hex[:10]}'
        settings = {'broker': broker, 'redis_url': redis_url(STORAGE_DB), 'name': name, **settings}
        worker = Worker(tmp_path_factory.mktemp('worker'), settings, *arguments)
        started.append(worker)
        worker.wait_until_ready()
        return worker

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope='session')
def worker(
    broker: str, redis_server: str, start_worker: Callable[..., Worker]
) -> Iterator[Worker]:
    """A prefork worker of two processes, shared by all tests of a broker."""
    worker = start_worker(broker, '--pool', 'prefork', '--concurrency', '2')
    yield worker
    worker.stop()


@pytest.fixture(autouse=True)
def _own_journal(request: pytest.FixtureRequest) -> None:
    """Hooks that run here note what they do in the journal of the test's worker.

    Others may have been started since that one was.
    """
    if 'worker' in request.fixturenames:
        integration_app.use_journal(request.getfixturevalue('worker').app)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run a script in a fresh process and return what it printed."""

    def run(script: str, *arguments: str, expect: int = 0, **environment: str) -> str:
        command = [sys.executable, *(arguments or ('-c', script))]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, timeout=60,
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == expect, f'{done.stdout}\n{done.stderr}'
        return done.stdout + done.stderr

    return run
