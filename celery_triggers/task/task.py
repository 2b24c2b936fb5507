"""The task class: tasks that can be released by triggers, and what they receive."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from celery import states
from celery._state import get_current_task
from celery.app import task as celery_task
from celery.app.task import Task
from celery.canvas import Signature
from celery.exceptions import Ignore
from celery.utils.imports import symbol_by_name
from celery.utils.time import maybe_make_aware

from celery_triggers.engine.instances import AGAIN, FAIL, replay_at_most
from celery_triggers.exceptions import TriggersError
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.checks import checked_kwargs
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.facts import exception_facts
from celery_triggers.manager.firing import Run
from celery_triggers.manager.header import header_in
from celery_triggers.task.claiming import ask, lease_seconds
from celery_triggers.task.context import TaskContext
from celery_triggers.task.endings import Replaced, Replayed, Skipped
from celery_triggers.task.replacement import hand_over
from celery_triggers.wiring import services_of

__all__ = ['TaskContext', 'TriggerTask', 'current_context']

logger = logging.getLogger(__name__)

#: Celery's answer to whether a result is wanted; not in its type stubs.
_ignores_result: Any = celery_task.get_actual_ignore_result  # type: ignore[attr-defined]

#: Options of ``apply_async`` that are particular to a call, and not kept for a retry.
_OF_A_CALL = frozenset({
    'task_id', 'countdown', 'eta', 'producer', 'connection', 'publisher', 'add_to_parent',
    'retry', 'retry_policy',
})

if TYPE_CHECKING:
    _BaseTask = Task[Any, Any]
elif os.environ.get('DJANGO_SETTINGS_MODULE') and find_spec('django'):
    # Celery's Django fixup gives tasks ``delay_on_commit`` by a task class of its own,
    # but only where no ``task_cls`` was chosen. It asks the same question as this does.
    from celery.contrib.django.task import DjangoTask as _BaseTask
else:
    _BaseTask = Task


def run_of(header: Mapping[str, Any], token: str) -> Run:
    """Return the run that a header and a claim stand for."""
    return Run(
        str(header['instance']),
        str(header['task_id']),
        int(header['attempt']),
        str(header['incarnation']),
        token,
    )


class TriggerTask(_BaseTask):
    """A Celery task that can be released by triggers.

    Use it for a whole application, ``Celery(..., task_cls='celery_triggers:TriggerTask')``,
    or as a base class with a method ``_run(self, context)``. Tasks that nobody released
    by a trigger behave as with :class:`celery.Task`.
    """

    abstract = True
    Request = 'celery_triggers.worker.request:TriggerRequest'

    #: Whether its code receives a context rather than arguments.
    takes_context = False

    #: Whether an instance whose worker is lost is replayed by itself, at most
    #: ``max_retries`` times in a row, where it is not run again (``acks_late``).
    replay_lost = False

    _stores_started = False

    # --------------------------------------------------------------- the code

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run with a context: one that is given first, or that of the request."""
        context, rest = self._context_and_rest(args, kwargs)
        kwargs.pop('trigger_kwargs', None)
        return self._run(context, *rest, **kwargs)

    def _run(self, context: TaskContext, *args: Any, **kwargs: Any) -> Any:
        """Do the work; to be overridden.

        Args:
            context: The context of this run.
            args: In a chain, the previous result; then those of its signature.
            kwargs: Those of its signature.

        Returns:
            A mapping becomes the kwargs of the cascade; ``None`` becomes ``{}``;
            anything else ``{"result": value}``.
        """
        raise NotImplementedError(f'{type(self).__name__} must define _run(self, context)')

    def _context_and_rest(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TaskContext, tuple[Any, ...]]:
        if args and isinstance(args[0], TaskContext):
            return args[0], args[1:]
        if header_in(self.request) is None:
            raise TriggersError(
                f'{self.name} is a trigger task: fire a trigger to run it, or call it with '
                'celery_triggers.testing.context(...) in a test'
            )
        return self._context(kwargs.get('trigger_kwargs')), args

    def _context(self, trigger_kwargs: Mapping[str, Any] | None) -> TaskContext:
        """Return the context of the request, made when it is first asked for."""
        request: Any = self.request
        known = request.get('triggers_context')
        if known is not None:
            return cast(TaskContext, known)
        delivery = self._delivery()
        assert delivery is not None
        context = TaskContext(
            cast(TriggerManager, delivery.manager),
            delivery.name,
            trigger_kwargs,
            logger_name=self.name,
            run=run_of(delivery.header, delivery.token),
        )
        request.triggers_context = context
        return context

    # ---------------------------------------------------------- what it may say

    def skip(self, metadata: Mapping[str, Any] | None = None) -> Skipped:
        """Return the exception that ends this instance as skipped: ``raise self.skip()``.

        Nothing is fired, and the Celery result is ``None``.
        """
        return Skipped(metadata)

    def replay(
        self,
        replacement_kwargs: Mapping[str, Any] | None = None,
        exc: BaseException | None = None,
        metadata: Mapping[str, Any] | None = None,
        countdown: float = 0,
    ) -> BaseException:
        """Return the exception that puts a new instance in this one's place.

        Args:
            replacement_kwargs: ``{trigger: kwargs}`` instead of what was fired.
            exc: Why. It is kept with the instance, and raised once ``max_retries``
                replays have led here.
            metadata: Facts to keep with this instance.
            countdown: Seconds before the new instance may run.

        Raises:
            InvalidFiring: The kwargs are no mappings or cannot be serialized.
        """
        # Called as a function, in a test, it has no instance. The storage is not asked: it may
        # be down just now, and the replay is kept until it is back.
        context = None if self.request.called_directly else current_context()
        depth = int((header_in(self.request) or {}).get('depth', 0))
        if self.max_retries is not None and depth >= self.max_retries:
            name = context.instance_name if context is not None else self.name
            return exc or self.MaxRetriesExceededError(f'{name} was replayed {depth} times already')
        if context is not None:
            for trigger, kwargs in (replacement_kwargs or {}).items():
                checked_kwargs(context.manager, trigger, kwargs)
        facts = dict(metadata or {})
        if exc is not None:
            facts['exception'] = exception_facts(exc)
        return Replayed(replacement_kwargs, facts, countdown)

    # ------------------------------------------------------------ the delivery

    def _delivery(self) -> Delivery | None:
        """Return the delivery that this request is, or ``None`` without a header."""
        request: Any = self.request
        header = header_in(request)
        if header is None:
            return None
        token = request.get('triggers_token')
        if not token:
            token = request.triggers_token = secrets.token_hex(8)
        app: Any = self.app
        delivery: Delivery = services_of(app).delivery(header, token)
        delivery.loss = self._loss()
        # Its own token and not this one, or a doubled message would run twice.
        delivery.inherits = str(header.get('claim') or '')
        delivery.claimed = True
        return delivery

    def _loss(self) -> str:
        """Say what becomes of an instance whose worker is lost while it runs this task."""
        if self.acks_late and self.reject_on_worker_lost:
            return AGAIN
        return replay_at_most(self.max_retries) if self.replay_lost else FAIL

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind to an application; from here on a delivery claims before its code runs."""
        if cls._run is not TriggerTask._run:
            cls.takes_context = True
        if cls.takes_context and app.conf.task_reject_on_worker_lost is None:
            # Celery acknowledges the late message of a lost process unless it is told
            # otherwise; a trigger task that acknowledges late is meant to run again.
            cls.reject_on_worker_lost = cls.reject_on_worker_lost is not False
        if cls.Request != TriggerTask.Request:
            cls.Request = _with_token(cls.Request)
        bound = super().bind(app)
        if cls.track_started:
            # Celery would store STARTED before the claim, so that a doubled delivery
            # turned a stored result back; the claim stores it instead.
            cls._stores_started = True
            cls.track_started = False
        if not hasattr(cls.before_start, '_triggers_claim'):
            cls.before_start = _claiming(cls.before_start)  # type: ignore[method-assign]
        return bound

    def _claim(self, kwargs: dict[str, Any]) -> Delivery | None:
        delivery = self._delivery()
        if delivery is not None:
            ask(self, delivery, delivery.claim)
            if self.request.is_eager:
                services_of(self.app).renew_while(self.request, delivery)
            if not self.takes_context:
                # The sender may have known it as a task that takes a context.
                kwargs.pop('trigger_kwargs', None)
        request: Any = self.request
        if (
            self._stores_started
            and not request.is_eager
            and not _ignores_result(self, request)
        ):
            self.backend.store_result(
                request.id,
                {'pid': os.getpid(), 'hostname': request.hostname},
                states.STARTED,
                request=request,
            )
        return delivery

    # ----------------------------------------------------- retry and replacement

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """Return the signature of a retry; its header names the next attempt."""
        signature = super().signature_from_request(*args, **kwargs)
        header = header_in(self.request)
        if header is not None:
            headers = dict(signature.options.get('headers') or {})
            headers.pop('triggers_token', None)
            following = {k: v for k, v in header.items() if k != 'claim'}
            headers['triggers'] = {**following, 'attempt': following['attempt'] + 1}
            signature.options['headers'] = headers
        return signature

    def same_message(self, **options: Any) -> Signature:
        """Return the signature of the message that runs now, for the same attempt."""
        signature = super().signature_from_request(**options)
        header = header_in(self.request)
        if header is not None:
            # Where another package has put headers of its own in the place of all.
            signature.options['headers'] = {
                **(signature.options.get('headers') or {}), 'triggers': header,
            }
        return signature

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Send the task; the retry of an instance is committed before it is sent."""
        header = (options.get('headers') or {}).get('triggers')
        if header is None or getattr(options.get('producer'), 'records_for_triggers', False):
            return super().apply_async(*args, **options)
        if get_current_task() is None and options.get('retries'):
            # retry_on_worker_lost: Celery retries for a lost child. Where that cannot be
            # done it goes on as if it had not been asked to.
            raise TriggersError(
                f'{header["instance"]} is not retried by Celery: what becomes of an instance '
                'whose worker is lost is seen to by celery_triggers'
            )
        if self._is_retry(header):
            self._retry_instance(*args, **options)
            return self.AsyncResult(header['task_id'])
        return super().apply_async(*args, **options)

    def _is_retry(self, header: Mapping[str, Any]) -> bool:
        request = self.request
        current = None if request.called_directly or request.is_eager else header_in(request)
        return current is not None and (header['task_id'], header['attempt']) == (
            current['task_id'],
            current['attempt'] + 1,
        )

    def _retry_instance(self, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        """Commit a retry with all that its message needs; it is sent after that."""
        delivery = self._delivery()
        assert delivery is not None
        delivery.patience = lease_seconds(delivery)
        context: Any = self.request.get('triggers_context')
        level = context.log_level if context is not None else 0
        message: dict[str, Any] = {
            'task': self.name,
            'args': list(args or ()),
            'kwargs': dict(kwargs or {}),
            'options': {
                name: value
                for name, value in options.items()
                if value is not None and name not in _OF_A_CALL
            }
        }
        message['options']['headers'] = {
            name: value
            for name, value in (options.get('headers') or {}).items()
            if name not in ('triggers', 'triggers_token')
        }
        copy = delivery.manager.storage.codec.copy(message)
        delivery.retry(_seconds_until(self.app, options), copy, level)

    def on_replace(self, sig: Signature) -> Any:
        """Hand the claim over to the replacement, whose outcome counts for the instance."""
        header = header_in(self.request)
        if header is None or self.request.is_eager:
            return super().on_replace(sig)
        delivery = self._delivery()
        assert delivery is not None
        hand_over(self.app, sig, delivery, header)
        try:
            return super().on_replace(sig)
        except Ignore as exc:
            raise Replaced(*exc.args) from exc


def _with_token(request: Any) -> Any:
    """Return a class of requests of one's own, with what a claim needs in the parent."""
    own, ours = symbol_by_name(request), symbol_by_name(TriggerTask.Request)
    if issubclass(own, ours):
        return own
    return type(own.__name__, (ours, own), {'__module__': own.__module__})


def _seconds_until(app: Any, options: Mapping[str, Any]) -> float:
    eta = options.get('eta')
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if eta is not None:
        # What Celery makes of one without a timezone.
        left = maybe_make_aware(eta, app.timezone) - app.now()
        return float(max(0.0, left.total_seconds()))
    return float(options.get('countdown') or 0)


def _claiming(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``before_start`` that claims, then does what the original did."""
    is_default = original is Task.before_start

    def before_start(self: TriggerTask, task_id: str, args: Any, kwargs: Any) -> Any:
        delivery = None
        if self._stores_started or header_in(self.request) is not None:
            delivery = self._claim(kwargs)
        result = None if is_default else original(self, task_id, args, kwargs)
        if delivery is not None:
            # The process may have been stopped since it claimed.
            ask(self, delivery, delivery.still_mine)
        return result

    before_start._triggers_claim = True  # type: ignore[attr-defined]
    return before_start


def current_context() -> TaskContext:
    """Return the context of the task that runs here, whatever kind of task it is.

    Raises:
        TriggersError: No task runs here, or it was not released by a trigger.
    """
    task: Any = get_current_task()
    header = header_in(task.request) if task is not None else None
    if task is None or header is None:
        raise TriggersError('no task that was released by a trigger runs here')
    if isinstance(task, TriggerTask):
        return task._context((task.request.kwargs or {}).get('trigger_kwargs'))
    delivery = services_of(task.app).delivery(header, '')
    return TaskContext(
        delivery.manager,
        delivery.name,
        None,
        logger_name=task.name,
        run=run_of(header, str(header.get('claim') or '')),
    )
