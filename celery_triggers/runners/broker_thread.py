"""Sends messages without ever holding up whoever fires: a thread, a connection, a limit.

A broker that is down may refuse, hang, or vanish in the middle of a message; kombu then
takes from one second to for ever. Nobody waits for that here: what was not sent in time
is sent by the sweep.

A message is made where it is released, with all that routers, signal handlers and
``apply_async`` have to say about it, and handed to the thread as it goes to the wire.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery.backends.base import DisabledBackend

from celery_triggers.forks import ForkGate, reset_in_child

__all__ = ['Job', 'Publisher']

logger = logging.getLogger(__name__)

#: For how many seconds a caller waits at most until its messages are sent.
LIMIT = 2.0

#: For how many seconds without a message sent the broker is taken to be down.
STUCK = 1.0

#: For how many seconds nothing is sent after a failure.
PAUSE = 5.0

#: What brokers are told besides what ``broker_transport_options`` says (seconds).
TRANSPORT_OPTIONS: dict[str, dict[str, Any]] = {
    'redis': {'socket_timeout': 1.5, 'socket_connect_timeout': 1.0},
    'amqp': {'confirm_publish': True, 'read_timeout': 1.5, 'write_timeout': 1.5},
}
#: After how many seconds without a message the thread ends.
IDLE = 60.0

CONNECT_TIMEOUT = 1.0
CONFIRM_TIMEOUT = 1.5

#: What goes to the wire for one message: arguments of the producer's last step.
Wire = list[tuple[tuple[Any, ...], dict[str, Any]]]


class BrokerDown(Exception):
    """The broker does not take messages; the cause says why."""


def is_refusal(exc: Exception) -> bool:
    """Tell whether a broker refuses one message, and not all: its queue is misconfigured, say.

    Whatever may be about the broker itself is not: it is out of memory, a replica that
    cannot be written to, or just silent.
    """
    code = getattr(exc, 'reply_code', None)
    if code is not None:
        # AMQP 0-9-1: content too large, access refused, not found, precondition failed.
        return code in (311, 403, 404, 406)
    if type(exc).__name__ == 'ResponseError':
        # Of Redis. WRONGTYPE: the queue's key holds something else.
        return str(exc).startswith('WRONGTYPE')
    return isinstance(exc, (TypeError, ValueError, LookupError, AttributeError))


@lru_cache(maxsize=8)
def _recording(own: type) -> Any:
    """Return a class of producers that note what they would put on the wire.

    That is the last step of kombu's producer; what comes before it, serializing for one,
    happens in the caller's thread.
    """

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        self.wire.append((args, kwargs))

    members = {'_publish': record, 'records_for_triggers': True}
    return type('RecordingProducer', (own,), members)


class Job:
    """Messages to be sent one after the other.

    Args:
        messages: What goes to the wire for each.
        sent: Is called in the end with the positions of those that were sent.
        refused: Is called with the position of one that the broker does not take, though
            it is up, and why.
    """

    def __init__(
        self,
        messages: Sequence[Wire],
        sent: Callable[[list[int]], None],
        refused: Callable[[int, Exception], None],
    ):
        self.messages = messages
        self.sent: list[int] = []
        self.done = threading.Event()
        self._note_sent = sent
        self._note_refused = refused

    def run(self, connection: _Connection, moved: Callable[[], None]) -> None:
        """Send everything; called in the publisher's thread.

        Raises:
            BrokerDown: The rest was not sent.
        """
        try:
            for index, message in enumerate(self.messages):
                moved()
                try:
                    connection.send(message)
                except BrokerDown:
                    raise
                except Exception as exc:  # noqa: BLE001
                    # The broker is up, so it is this message that it does not take.
                    self._note_refused(index, exc)
                else:
                    self.sent.append(index)
        finally:
            if self.sent:
                self._note_sent(self.sent)


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
        reset_in_child(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._sender: _Sender | None = None
        self._stuck: _Sender | None = None
        self._paused_until = 0.0
        self._unconnected: Any = None
        self._no_backend: Any = None

    # ----------------------------------------------------------------- recording

    @contextmanager
    def recording(self) -> Iterator[tuple[dict[str, Any], Wire]]:
        """Give options for ``apply_async`` with which it sends nothing yet, and what it would.

        Celery tells the result backend of each message before it sends it, for whoever
        waits in the same thread. Nobody waits here, and a backend that is down would hold
        the caller up for long, so it is not told.
        """
        if self._unconnected is None:
            self._no_backend = DisabledBackend(app=self.app)
            self._unconnected = self.app.connection_for_write()
        producer = _recording(self.app.amqp.Producer)(self._unconnected, auto_declare=False)
        wire: Wire = []
        producer.wire = wire
        options: dict[str, Any] = {'producer': producer, 'retry': False}
        if self._unconnected.transport.driver_type == 'amqp':
            options['confirm_timeout'] = CONFIRM_TIMEOUT
        with _instead_of_result_backend(self.app, self._no_backend):
            yield options, wire

    # ---------------------------------------------------------------- publishing

    @property
    def paused(self) -> bool:
        """Whether the broker was found to be down just now."""
        return time.monotonic() < self._paused_until

    def publish(self, job: Job) -> list[int]:
        """Send a job's messages; return the positions of those sent so far.

        It takes two seconds at most. What has not been sent by then may still be.
        """
        sender = None if self.paused else self._give(job)
        if sender is None:
            return []
        if not job.done.wait(LIMIT):
            self._find_out_about(sender)
        return list(job.sent)

    def _find_out_about(self, sender: _Sender) -> None:
        if not sender.runs:
            self.pause(RuntimeError('no thread runs in this process; uWSGI needs enable-threads'))
        elif sender.is_stuck:
            self.pause(TimeoutError(f'nothing was sent for {STUCK:g} seconds'))
            with self._lock:
                if self._sender is sender:
                    # It may hang for long. Another takes over once this one is free again.
                    self._sender, self._stuck = None, sender

    def pause(self, error: BaseException) -> None:
        """Send nothing for a while."""
        if not self.paused:
            logger.warning(
                'released tasks stay scheduled and are sent later, the broker does not take '
                'messages: %s: %s', type(error).__name__, error,
            )
        self._paused_until = time.monotonic() + PAUSE

    def _give(self, job: Job) -> _Sender | None:
        """Give a job to the thread; ``None`` if it hangs."""
        with self._lock:
            if self._stuck is not None:
                if self._stuck.is_stuck:
                    self._paused_until = time.monotonic() + PAUSE
                    return None
                self._stuck.jobs.put(None)
                self._stuck = None
            if self._sender is None or not self._sender.thread.is_alive():
                self._sender = _Sender(self, self._gate)
            self._sender.jobs.put(job)
            return self._sender

    def let_go(self, sender: _Sender) -> bool:
        """Forget a thread that has had nothing to do; tell whether it may end."""
        with self._lock:
            if not sender.jobs.empty():
                return False
            if self._sender is sender:
                self._sender = None
            return True


class _Sender:
    """The thread, with its jobs and its connection."""

    def __init__(self, publisher: Publisher, gate: ForkGate):
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._publisher = publisher
        self._gate = gate
        self._busy_since: float | None = None
        self.runs = False
        self.thread = threading.Thread(
            target=self._run, name='celery_triggers-publisher', daemon=True
        )
        self.thread.start()

    @property
    def is_stuck(self) -> bool:
        """Whether it has been at one message for too long."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > STUCK

    def _moved(self) -> None:
        self._busy_since = time.monotonic()

    def _run(self) -> None:
        self.runs = True
        connection = _Connection(self._publisher.app)
        while True:
            try:
                job = self.jobs.get(timeout=IDLE)
            except queue.Empty:
                # So that an application which is not used any more can go, too.
                job = None
                if not self._publisher.let_go(self):
                    continue
            if job is None:
                connection.close()
                return
            if self._publisher.paused:
                # What waited behind the failure is left to the sweep with it.
                job.done.set()
                continue
            self._moved()
            try:
                with self._gate:
                    job.run(connection, self._moved)
            except BrokerDown as exc:
                self._publisher.pause(exc.__cause__ or exc)
            except Exception:
                # The notes could not be made: the sweep looks at it in any case.
                logger.warning('what was sent could not be noted', exc_info=True)
            finally:
                self._busy_since = None
                # After a pause was noted, so that the one who waits knows of it.
                job.done.set()


class _Connection:
    """A connection to the broker that gives up soon."""

    def __init__(self, app: Any):
        self._app = app
        # Kept when the connection is lost, so that it goes on with the next of several URLs.
        self._connection: Any = None
        self._producer: Any = None

    def send(self, message: Wire) -> None:
        """Send a message; once more on a new connection, since the old one may be dead.

        Raises:
            BrokerDown: The broker does not take messages.
            Exception: The broker refuses this message alone.
        """
        for attempt in (1, 2):
            self._open()
            try:
                for args, kwargs in message:
                    self._producer._publish(*args, **kwargs)
                return
            except Exception as exc:
                self.close()
                if is_refusal(exc):
                    raise
                if attempt == 2:
                    raise BrokerDown from exc

    def _open(self) -> None:
        if self._producer is not None:
            return
        app = self._app
        try:
            if self._connection is None:
                self._connection = self._new_connection()
            self._connection.ensure_connection(
                max_retries=len(self._connection.alt) or 1,
                interval_start=0, interval_step=0, interval_max=0,
                timeout=CONNECT_TIMEOUT * 2, reraise_as_library_errors=False,
            )
            producer = app.amqp.Producer(self._connection, auto_declare=False)
            # Opened now, so that what is raised later is about the message.
            _ = producer.channel
        except Exception as exc:
            self.close()
            raise BrokerDown from exc
        self._producer = producer

    def _new_connection(self) -> Any:
        app = self._app
        first = app.connection_for_write()
        options = dict(TRANSPORT_OPTIONS.get(first.transport.driver_type, {}))
        options.update(
            # Of several URLs each is tried once.
            max_retries=max(0, len(first.alt) - 1),
            interval_start=0, interval_step=0, interval_max=0,
        )
        return app.connection_for_write(
            heartbeat=0, connect_timeout=CONNECT_TIMEOUT, transport_options=options
        )

    def close(self) -> None:
        """Drop the connection; the next message makes a new one."""
        self._producer = None
        if self._connection is not None:
            try:
                self._connection.collect(socket_timeout=0.1)
            except Exception:
                # It is dead: that is why it is closed.
                logger.debug('closing a broken connection failed', exc_info=True)


@contextmanager
def _instead_of_result_backend(app: Any, disabled: Any) -> Iterator[None]:
    """Let Celery believe in this thread that there is no result backend to be told."""
    local = getattr(app, '_local', None)
    if local is None or getattr(app, '_backend_cache', None) is not None:
        # One backend for all threads (result_backend_thread_safe) is told all the same.
        yield
        return
    known = getattr(local, 'backend', None)
    local.backend = disabled
    try:
        yield
    finally:
        if known is None:
            del local.backend
        else:
            local.backend = known
