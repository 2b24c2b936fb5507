"""The part of a worker that looks after sessions, in threads of its own in every kind of pool."""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timezone
from typing import Any

from celery import bootsteps

from celery_triggers.exceptions import StorageUnavailable, TriggersError
from celery_triggers.forks import ForkGate
from celery_triggers.sweep import SweepReport
from celery_triggers.wiring import services_of
from celery_triggers.worker.heart import BEATS, Heart
from celery_triggers.worker.held import deliveries_of, end
from celery_triggers.worker.revocations import Revocations

__all__ = ['Sweeper', 'SweeperStep']

logger = logging.getLogger(__name__)

#: The shortest pause between two passes (seconds), however much is due.
LEAST_PAUSE = 0.05


class Sweeper:
    """A thread that sweeps every ``triggers_sweep_interval`` seconds, or when more is due.

    Args:
        services: Of the worker's application.
    """

    def __init__(self, services: Any):
        self._services = services
        self._stopped = threading.Event()
        self._gate = ForkGate(patience=1.0, outer=True)
        self._thread = threading.Thread(
            target=self._run, name='celery_triggers-sweeper', daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Sweep no more; wait for the pass that is under way."""
        self._stopped.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = LEAST_PAUSE
        while not self._stopped.wait(pause):
            pause = self._pass()

    def _pass(self) -> float:
        """Sweep once; return for how many seconds to pause."""
        settings = self._services.settings
        interval = float(settings.sweep_interval)
        if not interval:
            return 10.0
        # Seldom in a short lease would look like an outage, after which nobody is judged.
        interval = min(interval, float(settings.lease) / 4)
        began = time.monotonic()
        try:
            report = self._sweep()
        except StorageUnavailable as exc:
            logger.warning('the sweep found no storage: %s', exc)
            return interval
        except Exception:
            # The thread must go on, whatever is wrong with one pass.
            logger.exception('a sweep failed')
            return interval
        if report.taken:
            logger.info('sweep: %s', report)
        if report.more and not report.errors:
            return LEAST_PAUSE
        # Nothing that falls due in between waits for the next regular pass.
        pause = interval - (time.monotonic() - began)
        if report.next_at is not None:
            until = (report.next_at - datetime.now(timezone.utc)).total_seconds()
            pause = min(pause, max(until, 0) + LEAST_PAUSE)
        return max(pause, LEAST_PAUSE)

    def _sweep(self) -> SweepReport:
        sweep = self._services.new_sweep()
        with self._gate:
            taken = sweep.take()
        for due in taken.entries:
            if self._stopped.is_set():
                # The rest comes again: each has a new date already.
                break
            # One at a time, so that a child that is to be forked waits for one at most.
            with self._gate:
                if not sweep.see_to(due):
                    break
        report: SweepReport = sweep.report
        return report


class SweeperStep(bootsteps.StartStopStep):
    """Starts the worker's heartbeats, its sweeps, and its look-out for revoked gates.

    They go on while the pool is stopped, since tasks still run then; the signal
    ``worker_shutdown`` ends them, which comes after that, or :meth:`terminate`.
    """

    requires = ('celery.worker.components:Pool',)
    name = 'celery_triggers.Sweeper'

    def __init__(self, parent: Any, **options: Any):
        super().__init__(parent, **options)
        parent.triggers_step = self
        self.sweeper: Sweeper | None = None
        self.heart: Heart | None = None
        self.revocations: Revocations | None = None

    def start(self, parent: Any) -> None:
        services = services_of(parent.app)
        try:
            services.settings.frozen().storage_location()
        except TriggersError:
            # An application without a storage has no sessions.
            return
        if self.sweeper is None:
            self.heart = Heart(
                lambda: deliveries_of(parent.app),
                lambda: float(services.settings.lease) / BEATS,
            )
            self.sweeper = Sweeper(services)
            self.revocations = Revocations(
                services, lambda: float(services.settings.sweep_interval) or 10.0
            )
            self.revocations.start()
            self.heart.start()
            self.sweeper.start()

    def stop(self, parent: Any) -> None:
        """Go on: see above."""

    def terminate(self, parent: Any) -> None:
        """Stop for good, the pool being gone: with a cold shutdown, or at the end of a warm one."""
        if self.heart is not None and self.sweeper is not None:
            self.heart.stop()
            self.sweeper.stop()
        if self.revocations is not None:
            self.revocations.stop()
        end(parent.app)
