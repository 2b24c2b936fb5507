"""An example's application, with a worker of its own started by the ``celery`` command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import redis
from celery import _state

from tests.parts.processes import end
from tests.parts.servers import ACCEPTANCE_DB, redis_url
from tests.parts.waiting import eventually

T = TypeVar('T')

ROOT = Path(__file__).resolve().parents[2]
REDIS_URL = redis_url(ACCEPTANCE_DB)

#: Statuses of an instance of which more will be heard without anybody's doing.
MOVING = ('scheduled', 'running')


class Example:
    """An example under a queue and keys of its own, which go when it is stopped.

    Args:
        module: The module of its application.
        folder: Where the worker's log goes.
    """

    def __init__(self, module: str, folder: Path):
        self.name = f'example-{uuid.uuid4().hex[:10]}'
        self.environ = {
            **os.environ, 'EXAMPLES_REDIS': REDIS_URL, 'EXAMPLES_NAME': self.name,
            'C_FORCE_ROOT': '1',
        }
        self.module = self._imported(module)
        self.app: Any = self.module.app
        self.log_file = folder / 'worker.log'
        command = [
            sys.executable, '-m', 'celery', '-A', module, 'worker',
            '--hostname', f'{self.name}@test', '--pool', 'solo', '--loglevel', 'INFO',
            '--without-gossip', '--without-mingle', '--without-heartbeat',
        ]
        with self.log_file.open('wb') as log:
            self.worker = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def _imported(self, name: str) -> ModuleType:
        """Import the example anew, under this name. Its application is the current one now."""
        self._before = _state._tls.current_app, _state.default_app
        finalizers = set(_state._on_app_finalizers)
        sys.modules.pop(name, None)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for variable in ('EXAMPLES_REDIS', 'EXAMPLES_NAME'):
                    patch.setenv(variable, self.environ[variable])
                return importlib.import_module(name)
        finally:
            _state._on_app_finalizers.intersection_update(finalizers)

    def stop(self) -> None:
        """End exactly this worker, and leave nothing behind in Redis."""
        try:
            end(self.worker)
        finally:
            # Results of a group that nobody waits for would speak when the process ends.
            for pending in getattr(self.app.backend, '_pending_results', ()):
                pending.clear()
            self.app.close()
            _state._tls.current_app, _state.default_app = self._before
            with redis.Redis.from_url(REDIS_URL) as client:
                for key in client.scan_iter(f'*{self.name}*', count=1000):
                    client.unlink(key)

    # ------------------------------------------------------------ for the tests

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors='replace')

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        """Wait until a condition holds, as long as the worker lives."""

        def alive_and_true() -> T:
            assert self.worker.poll() is None, f'the worker has ended:\n{self.log[-5000:]}'
            return condition()

        return eventually(alive_and_true, what)

    def uid(self, kind: str) -> str:
        return f'{kind}:{uuid.uuid4().hex[:8]}'

    def storage(self, uid: str) -> Any:
        return self.app.triggers.session(uid).storage

    def settled(self, uid: str, *names: str) -> dict[str, Any]:
        """Wait until these instances are there and nothing moves; return the statuses."""

        def instances() -> dict[str, Any] | None:
            found = self.storage(uid).instances
            moving = [i for i in found.values() if i.status in MOVING]
            return None if moving or not found.keys() >= set(names) else found

        found = self.wait_for(instances, f'{names} of session {uid} have settled')
        return {name: str(instance.status) for name, instance in found.items()}

    def result(self, uid: str, name: str) -> Any:
        """Wait until an instance has finished, and return its result."""
        return self.wait_for(
            lambda: (i := self.storage(uid).instances.get(name)) and i.status == 'finished' and i,
            f'{name} of session {uid} has finished',
        ).result

    def run(self) -> str:
        """Run the example as its README says; return what it printed."""
        done = subprocess.run(
            [sys.executable, '-m', self.module.__name__], cwd=ROOT, env=self.environ,
            capture_output=True, text=True, timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def running(module: str, folder: Path) -> Iterator[Example]:
    """Start an example's worker, and end it however the block is left."""
    example = Example(module, folder)
    try:
        example.wait_for(lambda: f'{example.name}@test ready.' in example.log, 'a worker is ready')
        yield example
    finally:
        example.stop()
