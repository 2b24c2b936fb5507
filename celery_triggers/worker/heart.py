"""Heartbeats: the leases of what runs in this process are renewed for as long as it lives."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.forks import ForkGate, ForkLock, reset_in_child
from celery_triggers.manager.delivery import Delivery
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import Write

__all__ = ['Heart', 'beat_while']

logger = logging.getLogger(__name__)

#: How many heartbeats a lease lasts for.
BEATS = 4


class Heart:
    """A thread that renews leases.

    Args:
        deliveries: Returns what this process holds at the moment.
        interval: Returns the seconds between heartbeats.
    """

    def __init__(
        self, deliveries: Callable[[], Iterable[Delivery]], interval: Callable[[], float]
    ):
        self._deliveries = deliveries
        self._interval = interval
        self._gate = ForkGate(patience=1.0, outer=True)
        self._reset()
        reset_in_child(self)

    def _reset(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Beat from now on, if it does not already."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._stopped = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stopped,),
                    name='celery_triggers-heart', daemon=True,
                )
                self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._stopped.set()

    def _run(self, stopped: threading.Event) -> None:
        pause = self._interval()
        while not stopped.wait(pause):
            pause = self._interval()
            try:
                with self._gate:
                    if not self.beat():
                        # Leases go on running while the storage is down.
                        pause = min(pause, 1.0)
            except Exception:
                # The thread must go on, whatever is wrong with one beat.
                logger.exception('a heartbeat failed')

    def beat(self) -> bool:
        """Renew all leases once; return ``False`` if the storage did not take them all."""
        groups: dict[type[StorageBackend], list[tuple[StorageBackend, Write]]] = {}
        for delivery in self._deliveries():
            storage = delivery.manager.storage
            groups.setdefault(type(storage), []).append((storage, delivery.beat_write()))
        complete = True
        for class_, writes in groups.items():
            complete = _write(class_, writes) and complete
        return complete


def _write(
    class_: type[StorageBackend], writes: Sequence[tuple[StorageBackend, Write]]
) -> bool:
    try:
        answers = class_.write_many(writes)
    except Exception:
        if len(writes) > 1:
            # One that cannot be written must not keep the others from it.
            written = [_write(class_, [write]) for write in writes]
            return all(written)
        storage, write = writes[0]
        logger.exception('the lease of %s of session %r is not renewed', write.name, storage.uid)
        return True
    for answer in answers:
        if isinstance(answer, StorageUnavailable):
            logger.warning('leases could not be renewed yet: %s', answer)
            return False
    return True


class _OwnRuns:
    """What runs in this process outside a worker's pool: eager tasks, tasks in threads."""

    def __init__(self) -> None:
        self._deliveries: weakref.WeakKeyDictionary[Any, Delivery] = weakref.WeakKeyDictionary()
        self._lock = ForkLock()
        self._heart = Heart(self.all, self._interval)
        reset_in_child(self)

    def _reset(self) -> None:
        self._deliveries.clear()

    def add(self, request: object, delivery: Delivery) -> None:
        with self._lock:
            self._deliveries[request] = delivery
        self._heart.start()

    def all(self) -> list[Delivery]:
        with self._lock:
            return list(self._deliveries.values())

    def _interval(self) -> float:
        leases = (float(delivery.manager.storage.settings.lease) for delivery in self.all())
        return min(leases, default=60.0) / BEATS


_own_runs = _OwnRuns()


def beat_while(request: object, delivery: Delivery) -> None:
    """Renew the lease of a delivery for as long as its request exists."""
    _own_runs.add(request, delivery)
