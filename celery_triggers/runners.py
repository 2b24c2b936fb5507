"""Task runners: what executes a released instance."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from celery.exceptions import Retry
from kombu.exceptions import EncodeError

from celery_triggers.delivery import Delivery, exception_facts
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import TriggersError
from celery_triggers.forks import ForkLock
from celery_triggers.manager import Release
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
    Delivery(release.manager, release.header).fail('cannot be dispatched', exception_facts(exc))


def _arguments(app: Any, release: Release) -> dict[str, Any]:
    """Return the kwargs of the message: a context's, or none for a plain task.

    A task that is not known here may be either; its context reads them where it runs.
    """
    task = app.tasks.get(release.config.run)
    kwargs = release.instance.kwargs
    # kombu's JSON would read an object with these keys as something else.
    if not getattr(task, 'takes_context', False) or kwargs.keys() == {'__type__', '__value__'}:
        return {}
    return {'trigger_kwargs': kwargs}


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
        record = release.instance.record
        message = record.message
        name = message.get('task', release.config.run)
        stored = dict(message.get('options') or {})
        headers = {**(stored.pop('headers', None) or {}), 'triggers': release.header}
        options = {
            **stored, **options,
            'task_id': record.task_id, 'headers': headers, 'add_to_parent': False,
        }
        if record.eta:
            options['eta'] = moment(record.eta)
        task = self.app.tasks.get(name)
        send = task.apply_async if task is not None else partial(self.app.send_task, name)
        if 'kwargs' in message:
            send(args=message['args'], kwargs=message['kwargs'], **options)
            return
        kwargs = _arguments(self.app, release)
        try:
            send(kwargs=kwargs, **options)
        except EncodeError:
            if not kwargs:
                raise
            # task_serializer takes less than triggers_serializer, in which they are stored.
            send(kwargs={}, **options)

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
        try:
            _run_here(self.app, release, throw=self.app.conf.task_eager_propagates)
        except TriggersError as exc:
            fail_dispatch(release, exc)


def _run_here(app: Any, release: Release, *, throw: bool) -> None:
    task = app.tasks.get(release.config.run)
    if task is None:
        raise TriggersError(f'no task {release.config.run!r} is registered in this process')
    attempt: Any = partial(
        task.apply,
        # What another process would receive: nothing that one task changes shows to others.
        kwargs=release.manager.storage.codec.copy(_arguments(app, release)),
        task_id=release.instance.task_id,
        headers={'triggers': release.header},
        throw=throw,
    )
    try:
        while attempt is not None:
            attempt = _attempt(release, attempt, throw=throw)
    except BaseException as exc:
        # Celery sends no signal for what it lets through to the caller.
        if release.manager.storage[release.instance.name].status is Status.RUNNING:
            _running(release).fail('raised', exception_facts(exc))
        if not isinstance(exc, Exception):
            raise
        raise EagerError(exc) from exc


def _attempt(release: Release, attempt: Callable[[], object], *, throw: bool) -> Any:
    """Make one attempt; return the next one if Celery left it to the caller."""
    try:
        attempt()
    except Retry as exc:
        # Where errors propagate, Celery raises its own retry instead of making it.
        signature: Any = getattr(exc, 'sig', None)
        if signature is None:
            raise
        _running(release).retry(0, send=False)
        retries = signature.options.get('retries', 0)
        return partial(signature.apply, retries=retries, throw=throw)
    return None


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
        thread = threading.Thread(
            target=self._run, args=(release,), name=f'trigger {release.instance.name}'
        )
        with self._lock:
            # Together, so that join_all() never meets a thread that has not been started.
            thread.start()
            self._threads.add(thread)

    def _run(self, release: Release) -> None:
        try:
            _run_here(self.app, release, throw=False)
        except EagerError:
            # The failure is the instance's; there is no caller here to tell.
            pass
        except TriggersError as exc:
            fail_dispatch(release, exc)
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
