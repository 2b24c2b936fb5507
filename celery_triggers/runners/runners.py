"""Task runners: what executes a released instance."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from celery.exceptions import Retry
from kombu.exceptions import EncodeError
from kombu.utils.functional import maybe_list

from celery_triggers.engine.calls import END, RUN, filled
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import TriggersError
from celery_triggers.forks import ForkLock
from celery_triggers.manager import Release
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.facts import exception_facts
from celery_triggers.registry import task_runners
from celery_triggers.storages.view import moment

__all__ = ['BaseTaskRunner', 'CeleryTaskRunner', 'ThreadingTaskRunner', 'task_runners']


class BaseTaskRunner(ABC):
    """Executes released instances of one application.

    Args:
        app: The Celery application.
    """

    #: Whether somebody else is asked to execute an instance. It is then noted that this was
    #: done, and done again if nobody has claimed the instance after some time.
    hands_over: ClassVar[bool] = True

    def __init__(self, app: Any):
        self.app = app

    @abstractmethod
    def run(self, release: Release) -> None:
        """Execute a released instance, or see to it that somebody does.

        An exception that is no broker error fails the instance.
        """


def fail_dispatch(release: Release, exc: BaseException) -> None:
    """Fail an instance that no runner can execute."""
    Delivery(release.manager, release.header).fail(
        'cannot be dispatched', exception_facts(exc), untold=True
    )


@dataclass(slots=True)
class Call:
    """What is called for a released instance.

    Attributes:
        task: The name of the Celery task.
        options: Of ``apply_async``.
    """

    task: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _call(app: Any, release: Release) -> Call:
    """Return what is called: a retry's message, a gate's signature, or what ``run`` says.

    Raises:
        TriggersError: An argument is to be a value that was not fired.
    """
    record = release.instance.record
    if 'kwargs' in record.message:
        call = Call(**copy(record.message))
    else:
        call = _own_call(release)
        kwargs = release.instance.kwargs
        takes_context = getattr(app.tasks.get(call.task), 'takes_context', False)
        # Not known here it may be either; its context reads them where it runs. And kombu's
        # JSON would read an object with these keys as something else.
        if takes_context and kwargs.keys() != {'__type__', '__value__'}:
            call.kwargs = {**call.kwargs, 'trigger_kwargs': kwargs}
    headers = dict(call.options.get('headers') or {})
    headers.pop('triggers_token', None)
    call.options = {
        **call.options,
        'task_id': record.task_id,
        'headers': {**headers, 'triggers': release.header},
        'add_to_parent': False,
    }
    return call


def _own_call(release: Release) -> Call:
    record, received = release.instance.record, release.instance.kwargs
    if record.gate is not None:
        gate = record.gate
        return Call(
            gate.call['task'],
            [*gate.args, *filled(gate.call['args'], received)],
            {**filled(gate.call['kwargs'], received), **gate.kwargs},
            dict(gate.call['options']),
        )
    run = release.config.run
    if isinstance(run, str):
        return Call(run)
    if run.get('subtask_type'):
        return Call(RUN, kwargs={'canvas': filled(run, received)}, options=_routed(run))
    options = {k: v for k, v in (run.get('options') or {}).items() if k != 'countdown'}
    return Call(
        run['task'],
        filled(run.get('args') or [], received),
        filled(run.get('kwargs') or {}, received),
        options,
    )


def _routed(canvas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which a canvas goes where its first task would go."""
    inside = dict(canvas.get('kwargs') or {})
    first = inside.get('tasks') or inside.get('header') or inside.get('task')
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if not isinstance(first, Mapping):
        return {}
    if first.get('subtask_type') in ('chain', 'group', 'chord'):
        return _routed(first)
    return _routing_of(first.get('task'), first.get('options') or {})


def _routing_of(task: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which a message goes where that of a task would go."""
    names = ('queue', 'exchange', 'routing_key', 'priority')
    chosen = {name: options[name] for name in names if options.get(name) is not None}
    return {'route_name': task, **chosen}


def _ending(release: Release) -> Call:
    """Return the call that ends the result of a gate which will not run."""
    record = release.instance.record
    assert record.gate is not None
    options = record.gate.call['options']
    exception = record.metadata.get('exception') or {}
    end = {
        'status': record.status.value,
        'reason': str(record.metadata.get('reason') or 'by hand'),
        'missing': record.metadata.get('missing') or [],
        'message': exception.get('message') or '',
        'result': record.metadata.get('result'),
    }
    request = {
        'id': record.task_id,
        'task': record.gate.call['task'],
        'chain': options.get('chain'),
        'chord': options.get('chord'),
        'group': options.get('group_id'),
        'group_index': options.get('group_index'),
        'errbacks': maybe_list(options.get('link_error')),
        'root_id': options.get('root_id'),
        'parent_id': options.get('parent_id'),
        'ignore_result': bool(options.get('ignore_result')),
    }
    return Call(
        END,
        kwargs={'header': release.header, 'end': end, 'request': request},
        options={'add_to_parent': False, **_routing_of(request['task'], options)},
    )


@task_runners.register('celery')
class CeleryTaskRunner(BaseTaskRunner):
    """Sends a Celery message; runs at once where ``task_always_eager`` is set."""

    _local = threading.local()

    def run(self, release: Release) -> None:
        if self.app.conf.task_always_eager:
            self._run_eagerly(release)
        else:
            self.send(release)

    def send(self, release: Release, **options: Any) -> None:
        """Send the message of an instance.

        Args:
            options: Further options of ``apply_async``.
        """
        call = _ending(release) if release.ends else _call(self.app, release)
        options = {**call.options, **options}
        if release.instance.record.eta and not release.ends:
            options['eta'] = moment(release.instance.record.eta)
        task = self.app.tasks.get(call.task)
        send = task.apply_async if task is not None else partial(self.app.send_task, call.task)
        try:
            send(args=call.args, kwargs=call.kwargs, **options)
        except EncodeError:
            kwargs = {k: v for k, v in call.kwargs.items() if k != 'trigger_kwargs'}
            if len(kwargs) == len(call.kwargs) or release.instance.record.message:
                raise
            # task_serializer takes less than triggers_serializer, in which they are stored.
            send(args=call.args, kwargs=kwargs, **options)

    def _run_eagerly(self, release: Release) -> None:
        """Run here and now; what that releases runs after it, not inside it."""
        queue = getattr(self._local, 'queue', None)
        if queue is not None:
            queue.append(release)
            return
        queue = self._local.queue = deque([release])
        errors: list[Exception] = []
        try:
            while queue:
                try:
                    self._run_one(queue.popleft())
                except EagerError as exc:
                    errors.append(exc)
        finally:
            del self._local.queue
        if errors:
            raise errors[0]

    def _run_one(self, release: Release) -> None:
        run_one(self.app, release, throw=self.app.conf.task_eager_propagates)


def run_one(app: Any, release: Release, *, throw: bool) -> Any:
    """Run a released instance here and now; return its last result, if it has one.

    Raises:
        EagerError: Its code raised, and that is passed on.
    """
    try:
        return _run_here(app, release, throw=throw)
    except TriggersError as exc:
        fail_dispatch(release, exc)
        return None


def _run_here(app: Any, release: Release, *, throw: bool) -> Any:
    call = _ending(release) if release.ends else _call(app, release)
    task = app.tasks.get(call.task)
    if task is None:
        raise TriggersError(f'no task {call.task!r} is registered in this process')
    # What another process would receive: nothing that one task changes shows to others.
    args, kwargs = release.manager.storage.codec.copy([call.args, call.kwargs])
    names = ('task_id', 'headers', 'link', 'link_error', 'ignore_result')
    options = {name: call.options[name] for name in names if name in call.options}
    attempt: Any = partial(task.apply, args=args, kwargs=kwargs, throw=throw, **options)
    result: Any = None
    try:
        while attempt is not None:
            result, attempt = _attempt(release, attempt, throw=throw)
    except BaseException as exc:
        # Celery sends no signal for what it lets through to the caller.
        if release.manager.storage[release.instance.name].status is Status.RUNNING:
            _running(release).fail('raised', exception_facts(exc))
        if not isinstance(exc, Exception):
            raise
        raise EagerError(exc) from exc
    return result


def _attempt(release: Release, attempt: Callable[[], object], *, throw: bool) -> Any:
    """Make one attempt; return its result, and the next one if Celery left that to the caller."""
    try:
        return attempt(), None
    except Retry as exc:
        # Where errors propagate, Celery raises its own retry instead of making it.
        signature: Any = getattr(exc, 'sig', None)
        if signature is None:
            raise
        _running(release).retry(0, send=False)
        retries = signature.options.get('retries', 0)
        return None, partial(signature.apply, retries=retries, throw=throw)


def _running(release: Release) -> Delivery:
    """Return the delivery that runs the instance now."""
    record = release.manager.storage[release.instance.name].record
    return Delivery(release.manager, release.header, record.token)


class EagerError(Exception):
    """Carries what an eager task raised past the dispatch, to whoever fired."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


@task_runners.register('threading')
class ThreadingTaskRunner(BaseTaskRunner):
    """Runs each instance in a thread of this process; for tests and scripts."""

    hands_over = False
    _threads: ClassVar[set[threading.Thread]] = set()
    _lock: ClassVar[ForkLock] = ForkLock()

    def run(self, release: Release) -> None:
        if release.ends:
            # Soon done, and whoever deletes the session wants to know that it was.
            run_one(self.app, release, throw=False)
            return
        thread = threading.Thread(
            target=self._run, args=(release,), name=f'trigger {release.instance.name}'
        )
        with self._lock:
            # Together, so that join_all() never meets a thread that has not been started.
            thread.start()
            self._threads.add(thread)

    def _run(self, release: Release) -> None:
        try:
            run_one(self.app, release, throw=False)
        except EagerError:
            # The failure is the instance's; there is no caller here to tell.
            pass
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    @classmethod
    def join_all(cls, timeout: float | None = None) -> None:
        """Wait until no thread runs any more, those included that others start.

        Raises:
            TimeoutError: A thread still runs after ``timeout`` seconds.
        """
        while True:
            with cls._lock:
                thread = next(iter(cls._threads), None)
            if thread is None:
                return
            thread.join(timeout)
            if thread.is_alive():
                raise TimeoutError(f'{thread.name} still runs after {timeout} seconds')
