"""One delivery of ``celery_triggers.end`` in a pool process: the product's own task, run here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from celery_triggers.canvas.own_tasks import _end_with
from celery_triggers.exceptions import StorageUnavailable
from tests.simulation.facts import Actor
from tests.simulation.storage import SimulatedStorageBackend

if TYPE_CHECKING:
    from tests.simulation.application import SimulatedApplication
    from tests.simulation.worker import Held

#: Seconds after which Celery runs a task again that a storage or a backend failed.
BACKOFF = 1.0


class EndRun:
    """A delivery that a child was given, which tells the end of a gate."""

    def __init__(self, application: SimulatedApplication, held: Held):
        self.world = application.world
        self.application = application
        self.message = held.message

    def run(self) -> None:
        """Tell the end; where somebody is down Celery makes a retry of it."""
        message = self.message
        request = SimpleNamespace(id=message.id, retries=message.retries, is_eager=False)
        task = SimpleNamespace(request=request, app=SimpleNamespace(backend=_Backend(self)))
        ledger = self.application.ledger
        assert message.end is not None
        with ledger.acting(Actor('end', message.retries, message.id, message.header)):
            try:
                _end_with(self.application)(task, **message.end)
            except (StorageUnavailable, ConnectionError) as exc:
                self.world.note(f'the end is told again: {exc}')
                self._retry()
        self.world.point()

    def _retry(self) -> None:
        self.world.happened['end retried'] += 1
        later = int(self.world.now + BACKOFF * 1000)
        again = replace(
            self.message, retries=self.message.retries + 1, not_before=later, visible_at=0
        )
        try:
            self.application.broker.publish(again)
        except (OperationalError, ValueError):
            # Celery rejects what it cannot send again.
            self.world.note('the broker is down too')


class _Backend:
    """A result backend, as the task that tells an end uses it."""

    def __init__(self, run: EndRun):
        self.run = run

    def mark_as_done(self, task_id: str, result: Any, request: Any, *, store_result: bool) -> None:
        self._end(task_id, 'SUCCESS', result, store_result)

    def mark_as_failure(
        self, task_id: str, exc: Any, *, request: Any, store_result: bool, state: str
    ) -> None:
        self._end(task_id, state, exc, store_result)

    def _end(self, task_id: str, state: str, value: Any, store: bool) -> None:
        """Store it, then call error callbacks and count the part of a chord."""
        run = self.run
        if store:
            run.application.results.store(task_id, state, value)
        run.world.point()
        message = run.message
        run.world.note(f'told the end of {message}')
        run.application.ledger.gates.told(message.header, message.id, SimulatedStorageBackend)
