"""What a worker's parent knows of the deliveries that it holds, and reports of them.

The parent outlives its children: it renews their leases, and it says so when one of them
is gone. Celery calls it in the worker's main loop, where nothing may take long.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import states
from celery.backends.base import DisabledBackend
from celery.worker import state as worker_state

from celery_triggers.exceptions import TriggersError
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.header import is_header
from celery_triggers.wiring import services_of
from celery_triggers.worker.report_queue import Reporter

__all__ = [
    'deliveries_of', 'delivery_of', 'end', 'hold', 'keep', 'request_of', 'submit',
    'submit_give_back', 'submit_loss',
]

logger = logging.getLogger(__name__)

reporter = Reporter()

#: Requests with a header that this worker has received, by the token of the delivery.
_held: dict[str, weakref.ref[Any]] = {}

#: Those that Celery has cancelled, whose processes may still be ending.
_cancelled: dict[str, Any] = {}


def hold(request: Any, token: str) -> None:
    """Remember a request, for as long as Celery does."""
    _held[token] = weakref.ref(request, lambda _: _held.pop(token, None))


def keep(request: Any, token: str) -> None:
    """Remember a request that was cancelled until its process is known to have ended."""
    _cancelled[token] = request


def _requests() -> Iterator[tuple[str, Any]]:
    yield from list(_cancelled.items())
    for token, reference in list(_held.items()):
        request = reference()
        if request is not None and token not in _cancelled:
            yield token, request


def request_of(task_id: str) -> Any:
    """Return a request that the parent has received and that is not over, or ``None``."""
    found = [request for _, request in _requests() if request.id == task_id]
    return found[-1] if found else None


def deliveries_of(app: Any) -> Iterator[Delivery]:
    """Yield the deliveries of an application that this worker has not finished with."""
    for token, request in _requests():
        if request.app is not app or not _is_held(request):
            continue
        delivery = delivery_of(app, request.request_dict['triggers'], token)
        if delivery is not None:
            yield delivery


def _is_held(request: Any) -> bool:
    """Tell whether a request waits or runs here; others exist a little longer than that."""
    return any(
        request in requests
        for requests in (
            worker_state.active_requests,
            worker_state.reserved_requests,
            getattr(worker_state, 'scheduled_requests', ()),
        )
    )


def delivery_of(app: Any, header: Mapping[str, Any], token: str) -> Delivery | None:
    """Return the delivery that a header and a token stand for, ``None`` if it is nobody's."""
    try:
        delivery: Delivery = services_of(app).delivery(header, token)
    except TriggersError as exc:
        # A header is data that anybody can send: what it names must be registered here.
        logger.warning('a message with the header %r is ignored: %s', dict(header), exc)
        return None
    except Exception:
        # Whatever is wrong with one, the others are still to be seen to.
        logger.exception('a message with the header %r is ignored', dict(header))
        return None
    # An outcome that no storage takes is offered for as long as the claim holds.
    delivery.patience = float(services_of(app).settings.lease)
    delivery.unmoved_by = (SoftTimeLimitExceeded,)
    return delivery


def submit(
    app: Any, header: Mapping[str, Any], token: str, report: Callable[[Delivery], object]
) -> None:
    """Report on a delivery through the queue."""

    def run() -> None:
        delivery = delivery_of(app, header, token)
        if delivery is not None:
            report(delivery)

    reporter.submit(run)


def submit_loss(task: Any, request: Any, message: str, *, untold: bool = False) -> None:
    """Report that the process is gone which was given a request.

    Args:
        untold: Whether Celery tells nobody who waits for the result.
    """
    header = request.request_dict.get('triggers')
    if not is_header(header):
        return

    def report(delivery: Delivery) -> None:
        if not finished_after_all(task, request.id, delivery):
            delivery.lose(message, untold=untold)

    submit(task.app, header, request.request_dict.get('triggers_token', ''), report)


def finished_after_all(task: Any, task_id: str, delivery: Delivery) -> bool:
    """Finish an instance whose result was stored before its worker was given up."""
    if isinstance(task.backend, DisabledBackend):
        return False
    try:
        result = task.AsyncResult(task_id)
        if result.state != states.SUCCESS:
            return False
        return delivery.finish(result.result, untold=True)
    except Exception:
        # No backend, or one that is down: the report itself is all that is known.
        logger.warning('the result of %s could not be read', task_id, exc_info=True)
        return False


def submit_give_back(app: Any, request: Any, token: str) -> None:
    """Give back what was cancelled, and whose process has ended; the broker has it still.

    It is then claimed by whoever gets the message, without waiting for a lease to lapse.
    """
    _cancelled.pop(token, None)
    if getattr(request.task, 'acks_late', False):
        header = request.request_dict['triggers']
        submit(app, header, token, lambda delivery: delivery.requeue())


def end(app: Any) -> None:
    """Give back all that this worker leaves unfinished, its processes being gone.

    Waits until that and all other reports have reached the storage.
    """
    for token, request in list(_requests()):
        if request.app is app:
            submit_give_back(app, request, token)
    if not reporter.flush():
        logger.error('some reports about task instances did not reach the storage in time')
