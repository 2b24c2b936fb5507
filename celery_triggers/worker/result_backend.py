"""What the result backend keeps of tasks: how they ended, and that they wait at a gate."""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone
from typing import Any

from celery import states
from celery.backends.base import DisabledBackend

from celery_triggers.wiring import StoredOutcome

__all__ = ['StoredOutcomes']

logger = logging.getLogger(__name__)

#: The state of a task that waits at a gate.
WAITING = 'WAITING'

#: For how many seconds a backend that did not answer is not asked again.
PAUSE = 10.0


class StoredOutcomes:
    """Reads outcomes from one application's result backend, and stores what comes before them.

    Args:
        app: The Celery application.
    """

    def __init__(self, app: Any):
        self._app = app
        self._paused_until = 0.0

    def of(self, task_id: str) -> StoredOutcome | None:
        """Return how a task ended, or ``None`` where that is not known.

        Without a result backend, with ``ignore_result``, or while the backend is down
        nothing is known.
        """
        backend = self._app.backend
        if isinstance(backend, DisabledBackend) or time.monotonic() < self._paused_until:
            return None
        try:
            meta = backend.get_task_meta(task_id, cache=False)
        except NotImplementedError:
            return None
        except Exception as exc:  # noqa: BLE001
            # A backend raises what its medium raises. Nothing hangs on it but a better answer.
            self._paused_until = time.monotonic() + PAUSE
            logger.warning('the result backend cannot be asked how %s ended: %s', task_id, exc)
            return None
        state = meta.get('status')
        if state not in (states.SUCCESS, states.FAILURE, states.REVOKED):
            return None
        return StoredOutcome(state, meta.get('result'), _milliseconds(meta.get('date_done')))

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        """Store the state ``WAITING`` of a task, unless it has ended.

        Without a backend, or while it is down, nothing is stored.
        """
        backend = self._app.backend
        if isinstance(backend, DisabledBackend) or time.monotonic() < self._paused_until:
            return
        try:
            if backend.get_task_meta(task_id, cache=False).get('status') in states.READY_STATES:
                return
            backend.store_result(task_id, {'uid': uid, 'instance': instance}, WAITING)
        except Exception as exc:  # noqa: BLE001
            # As above. The sweep stores it again.
            self._paused_until = time.monotonic() + PAUSE
            logger.warning('the result backend cannot be told that %s waits: %s', task_id, exc)


def _milliseconds(date: Any) -> int | None:
    """Return a date of a result backend, which is in UTC if it does not say otherwise."""
    if isinstance(date, str):
        try:
            date = datetime.fromisoformat(date)
        except ValueError:
            return None
    if not isinstance(date, datetime):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return int(date.timestamp() * 1000)
