"""The worker processes: started by the command ``celery``, ended by their ids."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

#: Seconds that a worker has to finish its task and leave, before it is killed.
_PATIENCE = 15


class WorkerDied(Exception):
    """A worker process ended before its time; the message ends with its last words."""


class Workers:
    """Worker processes, for as long as the ``with`` block lasts.

    Args:
        count: How many there are.
        folder: Where their logs go.
    """

    def __init__(self, count, folder):
        self._count = count
        self._folder = folder
        self._processes = []

    def __enter__(self):
        try:
            for number in range(1, self._count + 1):
                self._processes.append(self._start(number))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def check(self):
        """Raise :exc:`WorkerDied` if a worker is no longer there."""
        for number, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                log = self._log(number).read_text(errors='replace')
                raise WorkerDied(
                    f'worker {number} ended with status {process.returncode}:\n{log[-2000:]}'
                )

    def _log(self, number):
        return self._folder / f'worker{number}.log'

    def _start(self, number):
        command = [
            sys.executable, '-m', 'celery', '-A', 'examples.django_questionnaire', 'worker',
            '--hostname', f'worker{number}@questionnaires',
            # One process is one worker here: it runs its tasks itself.
            '--pool', 'solo', '--loglevel', 'INFO',
            '--without-gossip', '--without-mingle', '--without-heartbeat',
        ]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
        with self._log(number).open('wb') as log:
            return subprocess.Popen(
                command, env={**os.environ, 'PYTHONPATH': path}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
                # Ctrl-C in the terminal is for the site, which then ends the workers.
                start_new_session=True,
            )

    def _stop(self):
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
