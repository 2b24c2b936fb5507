"""Revoked tasks that wait at gates: ``AsyncResult.revoke()`` reaches workers, not sessions.

Celery tells every running worker which task ids are revoked, and a worker drops a message
that comes under one. A gate that waits has no message. So each worker looks up the ids that
it is told of, and revokes the gate in its session, which survives the worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery.worker import state as worker_state

from celery_triggers.exceptions import StorageUnavailable, TriggersError
from celery_triggers.forks import ForkGate
from celery_triggers.manager.gate_life import revoke_gate
from celery_triggers.registry import storage_backends

__all__ = ['Revocations', 'revoke_waiting']

logger = logging.getLogger(__name__)

#: How often the ids that the worker knows are looked at (seconds); that asks nobody.
PAUSE = 0.5

#: How many of the latest ids are looked up again from time to time: a gate may be applied
#: after its id was revoked.
MOST_LOOKED_UP = 1000


def revoke_waiting(services: Any, task_ids: list[str]) -> int:
    """Revoke the gates that wait under these task ids; return how many did.

    Args:
        services: Of the application.

    Raises:
        StorageUnavailable: The storage did not answer; calling again is safe.
    """
    key, url = services.settings.frozen().storage_location()
    found = storage_backends.get_class(key).gates(url, services.settings.frozen(), task_ids)
    revoked = 0
    for task_id, (uid, name) in found.items():
        if revoke_gate(services.session(uid), name, task_id):
            logger.info('%s of session %r was revoked while it waited', name, uid)
            revoked += 1
    return revoked


class Revocations:
    """A thread that revokes the gates whose ids this worker is told of.

    Args:
        services: Of the application.
        interval: Returns after how many seconds ids are looked up again.
    """

    def __init__(self, services: Any, interval: Callable[[], float]):
        self._services = services
        self._interval = interval
        self._stopped = threading.Event()
        self._gate = ForkGate(patience=1.0, outer=True)
        self._seen: set[str] = set()
        self._thread = threading.Thread(
            target=self._run, name='celery_triggers-revocations', daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        waited = 0.0
        while not self._stopped.wait(PAUSE):
            waited += PAUSE
            if waited >= max(self._interval(), PAUSE):
                self._seen.clear()
                waited = 0.0
            try:
                self._look()
            except StorageUnavailable as exc:
                logger.warning('revoked tasks cannot be looked up yet: %s', exc)
            except TriggersError as exc:
                logger.warning('a revoked task cannot be looked up: %s', exc)
            except Exception:
                # The thread must go on, whatever is wrong with one of them.
                logger.exception('looking up revoked tasks failed')

    def _look(self) -> None:
        ids = _revoked_ids()[-MOST_LOOKED_UP:]
        new = [task_id for task_id in ids if task_id not in self._seen]
        if new:
            with self._gate:
                revoke_waiting(self._services, new)
            # Not before: they are looked up again where the storage was down.
            self._seen.update(new)


def _revoked_ids() -> list[str]:
    """Return the ids that this worker knows to be revoked, the latest last."""
    while True:
        try:
            return [str(task_id) for task_id in worker_state.revoked]
        except RuntimeError:
            # It was changed meanwhile by the worker's main thread.
            continue
