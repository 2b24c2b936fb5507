"""A queue with a thread for what the worker's parent reports.

Celery calls signal handlers of revoked, unknown and lost tasks in the worker's main
loop. A storage that answers slowly must not stop that loop.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from celery_triggers.forks import ForkGate, reset_in_child

__all__ = ['Reporter']

logger = logging.getLogger(__name__)


class Reporter:
    """Runs callables one after the other in a thread, which starts with the first."""

    def __init__(self) -> None:
        # A child that is forked while a module is being imported here, say, could never
        # import it.
        self._gate = ForkGate(patience=1.0, outer=True)
        self._reset()
        # Neither the thread nor a lock that it held survives a fork.
        reset_in_child(self)

    def _reset(self) -> None:
        self._queue: queue.Queue[Callable[[], object]] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, report: Callable[[], object]) -> None:
        """Run a report soon; what it raises is logged."""
        self._queue.put(report)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name='celery_triggers-reports', daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while True:
            report = self._queue.get()
            try:
                with self._gate:
                    report()
            except Exception:
                # A report must not end the thread that makes the others.
                logger.exception('a report about a task instance failed')
            finally:
                self._queue.task_done()

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until what was submitted has run; tell whether it has."""
        done = threading.Event()
        if self._queue.unfinished_tasks == 0:
            return True
        self.submit(done.set)
        return done.wait(timeout)
