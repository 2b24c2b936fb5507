"""The worker processes of an example: started by the command ``celery``, ended by their id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ['WorkerDied', 'Workers']

_ROOT = Path(__file__).resolve().parents[1]

#: Seconds that a worker has to finish its task and leave, before it is killed.
_PATIENCE = 15.0


class WorkerDied(Exception):
    """A worker process ended before its time; the message ends with its last words."""


class Workers:
    """Worker processes, for as long as :meth:`running` lasts.

    Args:
        app: The module of their application.
        count: How many there are.
        folder: Where their logs go.
        host: What stands behind the @ of their names.
        environ: What they find in their environment beside what stands in this one.
    """

    def __init__(
        self, app: str, count: int, folder: Path, host: str,
        environ: Mapping[str, str] | None = None,
    ):
        self._app = app
        self._count = count
        self._folder = folder
        self._host = host
        self._environ = environ or {}
        self._processes: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def running(self) -> Iterator[Workers]:
        """Start the workers, and end exactly these however the block is left."""
        with _signals_as_exceptions():
            try:
                for number in range(1, self._count + 1):
                    self._processes.append(self._start(number))
                yield self
            finally:
                self._stop()

    def check(self) -> None:
        """Raise an error if a worker is no longer there.

        Raises:
            WorkerDied: It ended by itself.
        """
        for number, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                log = self._log(number).read_text(errors='replace')
                raise WorkerDied(
                    f'worker {number} ended with status {process.returncode}:\n{log[-2000:]}'
                )

    def _log(self, number: int) -> Path:
        return self._folder / f'worker{number}.log'

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, '-m', 'celery', '-A', self._app, 'worker',
            '--hostname', f'worker{number}@{self._host}',
            # One process is one worker here: it runs its tasks itself.
            '--pool', 'solo', '--loglevel', 'WARNING',
            '--without-gossip', '--without-mingle', '--without-heartbeat',
        ]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
        with self._log(number).open('wb') as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **self._environ, 'PYTHONPATH': path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for this process, which then ends the workers.
                start_new_session=True,
            )

    def _stop(self) -> None:
        for process in self._processes:
            # Does nothing to a process that has ended.
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let a polite request to end run the code that ends the workers."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
