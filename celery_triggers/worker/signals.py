"""Celery's signals, reported to the instance that a task runs for.

In a process that runs tasks, a handler commits at once. What the worker's parent
reports (revoked, unknown, rejected, lost tasks) goes through a queue. A task without
the header ``triggers`` is nobody's here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import signals, states
from celery._state import get_current_task
from celery.exceptions import Ignore, NotRegistered, Reject
from celery.utils.serialization import UnpickleableExceptionWrapper

from celery_triggers.engine.step import TIME_LIMIT, WORKER_LOST
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.facts import exception_facts
from celery_triggers.manager.header import header_in, is_header
from celery_triggers.task.endings import ClaimRefused, Replaced, Replayed, Skipped
from celery_triggers.task.task import TriggerTask
from celery_triggers.worker.held import (
    delivery_of,
    finished_after_all,
    request_of,
    submit,
    submit_loss,
)

__all__ = ['connect']

logger = logging.getLogger(__name__)


def connect() -> None:
    """Connect the handlers; connecting them again changes nothing."""
    for signal, handler in (
        (signals.task_success, on_success),
        (signals.task_failure, on_failure),
        (signals.task_retry, on_retry),
        (signals.task_revoked, on_revoked),
        (signals.task_rejected, on_rejected),
        (signals.task_unknown, on_unknown),
        (signals.task_postrun, on_postrun),
        (signals.worker_shutdown, on_shutdown),
    ):
        signal.connect(handler, weak=False, dispatch_uid=f'celery_triggers.{handler.__name__}')


def _whatever_the_limit(handler: Callable[..., None]) -> Callable[..., None]:
    """Let a handler do its work though the soft time limit strikes in it.

    The code has ended; only its outcome is still to be stored.
    """

    @wraps(handler)
    def handle(**facts: Any) -> None:
        try:
            handler(**facts)
        except SoftTimeLimitExceeded:
            # It strikes once. What was committed is found and not done again.
            handler(**facts)

    return handle


@_whatever_the_limit
def on_success(sender: Any = None, result: Any = None, **_: Any) -> None:
    """Finish the instance; its task's name is fired with the result."""
    delivery = _delivery(sender, sender.request)
    if delivery is not None:
        delivery.finish(result, _log_level(sender.request))


@_whatever_the_limit
def on_failure(
    sender: Any = None,
    task_id: str = '',
    exception: BaseException | None = None,
    einfo: Any = None,
    **_: Any,
) -> None:
    """Fail the instance, here and now if its code runs here, else through the queue."""
    running = get_current_task()
    if running is not None and running.name == sender.name and sender.request.id == task_id:
        delivery = _delivery(sender, sender.request)
        if delivery is not None:
            exception = _original(exception)
            facts = exception_facts(exception, str(einfo.traceback) if einfo else None)
            delivery.fail(_reason(exception), facts, _log_level(sender.request))
        return
    if isinstance(exception, WorkerLostError) and isinstance(sender, TriggerTask):
        # Its request has reported that, see TriggerRequest.
        return
    request = sender.request if sender.request.id == task_id else _context(task_id)
    facts = exception_facts(exception, str(einfo.traceback) if einfo else None)

    def report(delivery: Delivery) -> None:
        if not finished_after_all(sender, task_id, delivery):
            delivery.fail(_reason(exception), facts)

    _submit(sender, request, report)


def on_retry(sender: Any = None, request: Any = None, reason: Any = None, **_: Any) -> None:
    """Commit an eager retry. In a worker it was committed before it was sent.

    In the parent it means that a worker which acknowledges early is shut down in the
    middle of a task: Celery says "retry", and no message is left.
    """
    if request is None:
        return
    if getattr(request, 'is_eager', False):
        delivery = _delivery(sender, request)
        if delivery is not None:
            delivery.retry(0, send=False)
    elif get_current_task() is None and getattr(reason, 'sig', None) is None:
        held = request_of(request.id)
        if held is not None:
            submit_loss(sender, held, 'the worker was shut down while it ran', untold=True)


def on_revoked(
    sender: Any = None,
    request: Any = None,
    expired: bool = False,
    terminated: bool = False,
    **_: Any,
) -> None:
    """Revoke the instance, or fail it if its message had expired."""

    def report(delivery: Delivery) -> None:
        if expired:
            facts = {**exception_facts(None), 'message': 'the message expired'}
            delivery.fail('expired', facts)
        else:
            delivery.revoke('terminated' if terminated else 'revoked')

    _submit(sender, request, report)


def on_rejected(sender: Any = None, message: Any = None, exc: Any = None, **_: Any) -> None:
    """Fail the instance of a message that no worker can read."""
    _fail_message(sender, message, 'rejected', exc)


def on_unknown(sender: Any = None, message: Any = None, name: str = '', **_: Any) -> None:
    """Fail the instance of a task that no worker here knows."""
    _fail_message(sender, message, 'not registered', NotRegistered(name))


@_whatever_the_limit
def on_postrun(
    sender: Any = None, task_id: str = '', retval: Any = None, state: Any = None, **_: Any
) -> None:
    """See to endings that have no signal: ``Ignore`` and ``Reject``."""
    if state not in (states.IGNORED, states.REJECTED):
        return
    if isinstance(retval, (ClaimRefused, Replaced)):
        return
    request = sender.request
    delivery = _delivery(sender, request)
    if delivery is None:
        return
    level = _log_level(request)
    if isinstance(retval, Reject):
        _reject(sender, delivery, retval)
    elif isinstance(retval, Ignore):
        if isinstance(retval, Replayed):
            facts = (retval.replacement_kwargs, retval.metadata, retval.countdown, level)
            # Where this delivery still runs it, only a task that the session no longer
            # has can be in the way; a stale delivery fails nothing either.
            counted = delivery.replay(*facts)
            if not counted:
                delivery.patience = 0.0
                counted = delivery.fail(
                    'cannot be replayed', exception_facts(None), level, untold=True
                )
        else:
            metadata = retval.metadata if isinstance(retval, Skipped) else None
            counted = delivery.skip(metadata, level)
        # The result of a gate that is replayed is still to come, under the same id; that of
        # one that is skipped is ended like that of any gate.
        if counted and not delivery.header.get('gate'):
            # Not otherwise: the sweep would take the result for the instance's outcome.
            _store_none(sender, request)


def on_shutdown(sender: Any = None, **_: Any) -> None:
    """Let the parent's last reports reach the storage after a warm shutdown."""
    step = getattr(sender, 'triggers_step', None)
    if step is not None:
        step.terminate(sender)


# -------------------------------------------------------------------- helpers


def _delivery(task: Any, request: Any) -> Delivery | None:
    header = header_in(request)
    if header is None:
        return None
    delivery = delivery_of(task.app, header, _token(request, header))
    if delivery is not None:
        delivery.claimed = isinstance(task, TriggerTask)
        if request.is_eager:
            # There is a caller, who learns of it.
            delivery.patience = 0.0
    return delivery


def _token(request: Any, header: Mapping[str, Any]) -> str:
    """Return a delivery's token; a replacement that makes no claim carries one."""
    return str(request.get('triggers_token') or header.get('claim') or '')


def _submit(task: Any, request: Any, report: Callable[[Delivery], object]) -> None:
    """Report through the queue, for a request of this worker's parent."""
    header = header_in(request)
    if header is None:
        return
    submit(task.app, header, _token(request, header), report)


def _context(task_id: str) -> Any:
    """Return the context of a request that the parent has received."""
    request = request_of(task_id)
    return request._context if request is not None else None


def _fail_message(consumer: Any, message: Any, reason: str, exc: Any) -> None:
    header: Any = (getattr(message, 'headers', None) or {}).get('triggers')
    if not is_header(header):
        return
    facts = exception_facts(exc if isinstance(exc, BaseException) else None, '')
    submit(consumer.app, header, '', lambda delivery: delivery.fail(reason, facts))


def _original(exception: BaseException | None) -> BaseException | None:
    """Return the exception that is being handled, for what Celery made of it.

    One that cannot be pickled Celery replaces by a wrapper, or by one of a base class.
    """
    handled = sys.exc_info()[1]
    if isinstance(exception, UnpickleableExceptionWrapper):
        return handled or exception
    return handled if handled and type(exception) in type(handled).__mro__ else exception


def _reason(exception: BaseException | None) -> str:
    """Say what kind of failure it was; the words in ``step.LOST`` may be taken back."""
    if isinstance(exception, WorkerLostError):
        return WORKER_LOST
    if isinstance(exception, TimeLimitExceeded):
        return TIME_LIMIT
    return 'rejected' if isinstance(exception, Reject) else 'raised'


def _reject(task: Any, delivery: Delivery, exc: Any) -> None:
    if not exc.requeue:
        delivery.fail('rejected', exception_facts(exc))
        return
    # The broker has forgotten a message that was acknowledged early: requeueing does nothing.
    delivery.requeue(send=not task.acks_late)


def _store_none(task: Any, request: Any) -> None:
    """Give a task that ended without a result one, so that nobody waits for ever."""
    if not request.is_eager and not task.ignore_result:
        task.backend.mark_as_done(request.id, None, request)


def _log_level(request: Any) -> int:
    context = request.get('triggers_context')
    return context.log_level if context is not None else 0
