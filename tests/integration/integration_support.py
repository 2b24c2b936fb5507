"""Workers started by the ``celery`` command, and how to wait for what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import integration_app
import kombu
import pytest
import redis

from tests.parts import waiting
from tests.parts.processes import end
from tests.parts.servers import BROKER_DB, STORAGE_DB, nothing_may_be_missing, redis_url

T = TypeVar('T')

HERE = Path(__file__).parent

#: Seconds within which whatever a test waits for must have happened.
PATIENCE = float(os.environ.get('TRIGGERS_TEST_PATIENCE', '30'))


def eventually(condition: Callable[[], T], what: str = '', timeout: float = PATIENCE) -> T:
    """Ask until the answer is true, and return it; fail after ``timeout`` seconds."""
    return waiting.eventually(condition, what, timeout)


def unavailable(what: str, exc: Exception) -> None:
    """Skip by name, or fail where nothing may be missing."""
    message = f'{what} is not reachable: {exc}'
    if nothing_may_be_missing():
        pytest.fail(message)
    pytest.skip(message)


def clean_redis(name: str) -> None:
    for db in (BROKER_DB, STORAGE_DB):
        with redis.Redis.from_url(redis_url(db)) as client:
            for keys in _chunks(client.scan_iter(f'{name}*', count=1000)):
                client.unlink(*keys)


def _chunks(keys: Iterator[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for key in keys:
        chunk.append(key)
        if len(chunk) == 500:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Worker:
    """A worker in a session of its own, and an application to talk to it with.

    Args:
        directory: Where its log goes.
        settings: What :func:`integration_app.create` takes.
        arguments: Of ``celery worker``.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *arguments: str):
        self.stopped = False
        self.name = settings['name']
        self.settings = settings
        self.app = integration_app.create(**settings)
        self.log_file = directory / f'{self.name}.log'
        self.node = f'{self.name}@test'
        queues = [self.name, f'{self.name}-other']
        command = [
            sys.executable, '-m', 'celery', '-A', 'integration_worker', 'worker',
            '--hostname', self.node, '--queues', ','.join(queues), '--loglevel', 'INFO',
            '--without-gossip', '--without-mingle', '--without-heartbeat', *arguments,
        ]
        with self.log_file.open('wb') as log:
            self.process = subprocess.Popen(
                command, cwd=HERE, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to build the same application."""
        return {
            **os.environ,
            'C_FORCE_ROOT': '1',
            integration_app.ENVIRONMENT: json.dumps(self.settings),
            'PYTHONPATH': os.pathsep.join(filter(None, (str(HERE), os.environ.get('PYTHONPATH')))),
        }

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors='replace')

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: f'{self.node} ready.' in self.log, f'{self.node} is ready')

    def stop(self) -> None:
        """End exactly this worker; its children are in its process group."""
        if self.stopped:
            return
        self.stopped = True
        try:
            end(self.process)
        finally:
            self.app.close()
            self._clean()

    def _clean(self) -> None:
        if self.app.conf.broker_url.startswith('amqp'):
            with self.app.connection_for_write() as connection:
                channel = connection.default_channel
                for suffix in ('', '-other', '-parked'):
                    channel.queue_delete(self.name + suffix)
                    channel.exchange_delete(self.name + suffix)
        clean_redis(self.name)

    # ------------------------------------------------------------ for the tests

    def uid(self, scenario: str) -> str:
        """Return a new uid of a scenario."""
        return f'{scenario}:{uuid.uuid4().hex[:12]}'

    def fire(self, scenario: str, trigger: str, kwargs: dict[str, Any] | None = None) -> str:
        """Fire into a new session and return its uid."""
        uid = self.uid(scenario)
        self.app.triggers.fire(uid, trigger, kwargs)
        return uid

    def storage(self, uid: str) -> Any:
        return self.app.triggers.session(uid).storage

    def settled(self, uid: str, count: int = 1) -> dict[str, Any]:
        """Wait until nothing of a session is on its way any more; return its instances."""

        def instances() -> dict[str, Any] | None:
            found = self.storage(uid).instances
            moving = [i for i in found.values() if i.status in ('scheduled', 'running')]
            return None if moving or len(found) < count else found

        return self.wait_for(instances, f'session {uid} has settled')

    def status(self, uid: str, name: str, *wanted: str) -> Any:
        """Wait until an instance has one of these statuses; return it."""

        def instance() -> Any:
            found = self.storage(uid).instances.get(name)
            return found if found is not None and found.status in wanted else None

        return self.wait_for(instance, f'{name} of {uid} is {wanted}')

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        def alive_and_true() -> T:
            assert self.process.poll() is None, f'the worker has ended:\n{self.log[-5000:]}'
            return condition()

        return eventually(alive_and_true, what)

    def revoked(self) -> list[str]:
        """Return the ids of the tasks that the worker knows to be revoked."""
        inspect = self.app.control.inspect(destination=[self.node], timeout=2)
        return (inspect.revoked() or {}).get(self.node, [])

    def fired(self, uid: str) -> list[str]:
        """Return the triggers of a session in the order in which they were fired."""
        return [record.trigger for record in self.storage(uid).history]

    def lines(self, key: str) -> list[str]:
        integration_app.use_journal(self.app)
        return integration_app.lines(key)

    def barrier(self) -> None:
        """Wait until the worker has seen to all that it had received or reported before."""
        for trigger in ('go', 'unknown'):
            self.settled(self.fire('barrier', trigger))

    def parked_messages(self, count: int = 1) -> list[kombu.Message]:
        """Take messages out of the queue that the worker does not read."""
        with self.app.connection_for_read() as connection:
            queue = kombu.Queue(f'{self.name}-parked', channel=connection.default_channel)

            def taken() -> Any:
                message = queue.get(no_ack=True)
                return message and (message.body, dict(message.headers), dict(message.properties),
                                    message.content_type, message.content_encoding)

            return [eventually(taken, 'a message is parked') for _ in range(count)]

    def publish(self, message: Any) -> None:
        """Publish a message, the very same, to the queue that the worker reads."""
        body, headers, properties, content_type, content_encoding = message
        kept = {k: v for k, v in properties.items() if k in ('correlation_id', 'reply_to')}
        with self.app.connection_for_write() as connection:
            kombu.Producer(connection).publish(
                body, routing_key=self.name, exchange=self.name, headers=headers,
                content_type=content_type, content_encoding=content_encoding, **kept,
            )
