"""Sends messages without ever holding up whoever fires: a thread, a connection, a limit.

A broker that is down may refuse, hang, or vanish in the middle of a message; kombu then
takes from one second to for ever. Nobody waits for that here: what was not sent in time
is sent by the sweep.
"""

from __future__ import annotations

import contextvars
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from celery.backends.base import DisabledBackend

from celery_triggers.forks import ForkGate

__all__ = ['Job', 'Publisher']

logger = logging.getLogger(__name__)

#: For how many seconds a caller waits at most until its messages are sent.
LIMIT = 2.0

#: For how many seconds nothing is sent after a failure.
PAUSE = 5.0

#: What brokers are told besides what ``broker_transport_options`` says (seconds).
TRANSPORT_OPTIONS: dict[str, dict[str, Any]] = {
    'redis': {'max_retries': 0, 'socket_timeout': 1.5, 'socket_connect_timeout': 1.0},
    'amqp': {
        'max_retries': 0, 'confirm_publish': True, 'read_timeout': 1.5, 'write_timeout': 1.5,
    },
}
CONNECT_TIMEOUT = 1.0
CONFIRM_TIMEOUT = 1.5


class Job:
    """Messages to be sent one after the other, and what is done afterwards.

    Args:
        messages: Each sends one, given the producer and further options of ``apply_async``.
            What goes wrong with one of them alone it must deal with; what it raises means
            that the broker is down.
        confirm: Is called in the end with the positions of those that were sent.
    """

    def __init__(
        self,
        messages: list[Callable[[Any, dict[str, Any]], None]],
        confirm: Callable[[list[int]], None],
    ):
        self._messages = messages
        self._confirm = confirm
        self._context = contextvars.copy_context()
        self.sent: list[int] = []
        self.error: Exception | None = None
        self.moved_at = time.monotonic()
        self.done = threading.Event()

    def run(self, connection: _Connection) -> None:
        """Send everything; called in the publisher's thread."""
        try:
            for index, message in enumerate(self._messages):
                self._context.run(connection.send, message)
                self.sent.append(index)
                self.moved_at = time.monotonic()
        except Exception as exc:  # noqa: BLE001
            # A transport raises whatever it likes; all of it means: not confirmed.
            self.error = exc
        finally:
            try:
                if self.sent:
                    self._confirm(self.sent)
            finally:
                self.done.set()


class Publisher:
    """Sends one application's messages from a thread of its own.

    Args:
        app: The Celery application.
    """

    def __init__(self, app: Any):
        self.app = app
        self._gate = ForkGate(patience=1.0, outer=True)
        self._reset()
        # Neither the thread nor its connection may be used in a forked child.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._sender: _Sender | None = None
        self._stuck: _Sender | None = None
        self._paused_until = 0.0

    @property
    def paused(self) -> bool:
        """Whether the broker was found to be down just now."""
        return time.monotonic() < self._paused_until

    def publish(self, job: Job) -> list[int]:
        """Send a job's messages; return the positions of those sent so far.

        It takes two seconds at most. What has not been sent by then may still be.
        """
        if self.paused:
            return []
        sender = self._free_sender()
        if sender is None:
            return []
        sender.jobs.put(job)
        done = job.done.wait(LIMIT)
        if job.error is not None:
            self._pause(job.error)
        elif not done and time.monotonic() - job.moved_at > LIMIT / 2:
            self._pause(TimeoutError(f'nothing was sent for {LIMIT / 2:g} seconds'))
            with self._lock:
                if self._sender is sender:
                    # It may hang for long. Another takes over once this one is free again.
                    self._sender, self._stuck = None, sender
        return list(job.sent)

    def _free_sender(self) -> _Sender | None:
        with self._lock:
            if self._stuck is not None:
                if self._stuck.is_busy:
                    self._paused_until = time.monotonic() + PAUSE
                    return None
                self._stuck.jobs.put(None)
                self._stuck = None
            if self._sender is None or not self._sender.thread.is_alive():
                self._sender = _Sender(self.app, self._gate)
            return self._sender

    def _pause(self, error: Exception) -> None:
        self._paused_until = time.monotonic() + PAUSE
        logger.warning(
            'released tasks stay scheduled and are sent later, the broker does not take '
            'messages: %s: %s', type(error).__name__, error,
        )


class _Sender:
    """The thread, with its jobs and its connection."""

    def __init__(self, app: Any, gate: ForkGate):
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.is_busy = False
        self._app = app
        self._gate = gate
        self.thread = threading.Thread(
            target=self._run, name='celery_triggers-publisher', daemon=True
        )
        self.thread.start()

    def _run(self) -> None:
        _ask_no_result_backend(self._app)
        connection = _Connection(self._app)
        while True:
            job = self.jobs.get()
            if job is None:
                connection.close()
                return
            self.is_busy = True
            try:
                with self._gate:
                    job.run(connection)
            except Exception:
                # The confirmation failed: the sweep looks at it in any case.
                logger.warning('a message was sent but could not be confirmed', exc_info=True)
            finally:
                self.is_busy = False


class _Connection:
    """A connection to the broker that gives up soon."""

    def __init__(self, app: Any):
        self._app = app
        self._producer: Any = None
        self._confirms = False

    def send(self, message: Callable[[Any, dict[str, Any]], None]) -> None:
        """Send a message; once more on a new connection if an old one turns out to be dead."""
        is_old = self._producer is not None
        try:
            self._send(message)
        except Exception:
            self.close()
            if not is_old:
                raise
            self._send(message)

    def _send(self, message: Callable[[Any, dict[str, Any]], None]) -> None:
        if self._producer is None:
            self._open()
        options: dict[str, Any] = {'retry': False}
        if self._confirms:
            options['confirm_timeout'] = CONFIRM_TIMEOUT
        message(self._producer, options)

    def _open(self) -> None:
        app = self._app
        kind = app.connection_for_write().transport.driver_type
        connection = app.connection_for_write(
            heartbeat=0,
            connect_timeout=CONNECT_TIMEOUT,
            transport_options=TRANSPORT_OPTIONS.get(kind, {'max_retries': 0}),
        )
        self._confirms = kind == 'amqp'
        self._producer = app.amqp.Producer(connection, auto_declare=False)

    def close(self) -> None:
        """Forget the connection."""
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                producer.connection.collect(socket_timeout=0.1)
            except Exception:
                # It is dead: that is why it is closed.
                logger.debug('closing a broken connection failed', exc_info=True)


def _ask_no_result_backend(app: Any) -> None:
    """Have this thread tell no result backend of what it sends.

    Celery subscribes to each result before it sends the message, for whoever waits in the
    same thread. Nobody waits in this one, and a backend that is down would hold it up.
    """
    if getattr(app, '_backend_cache', None) is None and hasattr(app, '_local'):
        app._local.backend = DisabledBackend(app=app)
