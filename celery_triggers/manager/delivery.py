"""What a delivery of a released message does to its instance: claims it, ends it.

A delivery is known by the message's header and by a token of its own. Late, doubled and
foreign messages are ignored and logged: they change nothing and raise nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kombu.exceptions import EncodeError

from celery_triggers.engine import plans
from celery_triggers.engine.instances import (
    CLAIMED_BY,
    FAIL,
    HANDED_OVER,
    HANDED_TO_GATE,
    Instance,
)
from celery_triggers.engine.session import Plan
from celery_triggers.engine.step import Step, cascade_kwargs
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import InvalidTransition, StorageUnavailable
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.facts import exception_facts, lost_worker, storable
from celery_triggers.manager.follow_up import follow_up, prepare
from celery_triggers.manager.patience import make_patiently
from celery_triggers.storages.records import Row, StorageTime, Write

__all__ = ['Delivery', 'uptime']

logger = logging.getLogger(__name__)

#: For how many seconds a delivery waits that comes before its time: clocks differ.
EARLY_PATIENCE = 2.0

#: Which part of a lease may have passed since a claim that is still relied on.
SURE_OF_LEASE = 0.5

@dataclass(slots=True)
class Delivery:
    """One delivery of a released message.

    Attributes:
        manager: Of the session that the header names.
        header: The message's header, see :func:`.header_of`.
        token: This delivery's own, ``''`` for a task that makes no claim.
        loss: What becomes of the instance if the worker is lost that runs it.
        process: The id of the process that claims. Celery may give a request to a second child
            if the first one has died before its parent knew that it had begun; both would have
            the same token.
        inherits: The claim of the task whose place this one takes, which it makes its own.
        claimed: Whether it is known to have claimed. What reports on it otherwise, such as
            the worker's parent, may also act on an instance that nobody has claimed.
        patience: For how many seconds a report is repeated that meets no storage.
        unmoved_by: Exceptions that may strike at any time and must not stop a report: the
            code has ended, and its soft time limit means nothing any more.
        by_sweep: Whether the sweep reports in its name, which counts only while its lease has
            lapsed: a worker that has been heard of reports by itself. A success always counts.
    """

    manager: Controller
    header: Mapping[str, Any]
    token: str = ''
    loss: str = FAIL
    process: int = field(default_factory=os.getpid)
    inherits: str = ''
    claimed: bool = False
    patience: float = 0.0
    unmoved_by: tuple[type[Exception], ...] = ()
    by_sweep: bool = False
    _claimed_at: float = 0.0

    @property
    def name(self) -> str:
        return str(self.header['instance'])

    def _if(self, status: Status, **columns: Any) -> dict[str, Any]:
        """Return a guard: this delivery's attempt has a status, and what else is said."""
        return {
            'attempt': self.header['attempt'], 'task_id': self.header['task_id'],
            'status': status.value, **columns,
        }

    def _write(
        self,
        guards: Sequence[Mapping[str, Any]],
        changes: Mapping[str, Any],
        due: int | StorageTime | None = None,
    ) -> Write:
        return Write(self.name, str(self.header['incarnation']), guards, changes, due)

    @property
    def _lease(self) -> int:
        return int(float(self.manager.storage.settings.lease) * 1000)

    def claim(self) -> bool:
        """Take the right to run the attempt; tell whether this delivery has it.

        Repeating one's own claim is harmless, in the same process.

        Raises:
            StorageUnavailable: The storage did not answer.
        """
        while True:
            before = uptime()
            granted, row = self.manager.storage.write(self._claim_write())
            if granted or row is None or not self._is(row, Status.SCHEDULED):
                break
            if not self._wait_for(row):
                return False
        self._claimed_at = before
        self.claimed = granted
        if not granted and row is not None and self._is(row, Status.RUNNING, token=self.token):
            self._end_lease()
        if row is None:
            storage = self.manager.storage
            logger.warning(
                '%s of session %r cannot be claimed: %s under the key prefix %r has no such '
                'instance. The session was deleted, or triggers_storage or '
                'triggers_key_prefix differ from those of the process that released it.',
                self.name, self.header['uid'], storage.place, storage.settings.key_prefix,
            )
        elif not granted:
            self._ignore(
                f'cannot claim attempt {self.header["attempt"]}: '
                f'the instance is {row.status}, attempt {row.attempt}'
            )
        return granted

    def _claim_write(self) -> Write:
        loss = f'{self.loss}{CLAIMED_BY}{self.process}'
        inherited = [self._if(Status.RUNNING, token=self.inherits)] if self.inherits else []
        return self._write(
            [
                self._if(Status.SCHEDULED, eta=StorageTime()),
                self._if(Status.RUNNING, token=self.token, loss=loss),
                *inherited,
            ],
            {
                'status': Status.RUNNING.value,
                'token': self.token,
                'lease': StorageTime(self._lease),
                'claimed': StorageTime(),
                'loss': loss,
                'spared': 0,
            },
            StorageTime(self._lease),
        )

    def _end_lease(self) -> None:
        """Let the sweep see at once to what a process of the same worker had claimed.

        That process is gone, or Celery would not have given its request to this one.
        """
        running = self._if(Status.RUNNING, token=self.token)
        self.manager.storage.write(
            self._write([running], {'lease': StorageTime(), 'spared': 1}, StorageTime())
        )

    def _is(self, row: Row, status: Status, **columns: Any) -> bool:
        """Tell whether a row would pass the guard of the same arguments."""
        expected = self._if(status, **columns)
        return all(getattr(row, column) == value for column, value in expected.items())

    def _wait_for(self, row: Row) -> bool:
        """Wait until the attempt may run; leave it to its due date if that takes long."""
        left = (row.eta - self.manager.storage.read(Plan()).now) / 1000
        if left <= EARLY_PATIENCE:
            # This host's clock is a little ahead of the storage's.
            time.sleep(max(left, 0.001))
            return True
        self._ignore(f'comes {left:.0f} seconds too early; it is sent again when it is time')
        self.manager.storage.write(self._write([self._if(Status.SCHEDULED)], {}, row.eta))
        return False

    def still_mine(self) -> bool:
        """Tell whether the claim holds; asked just before the code starts.

        The process may have been stopped since it claimed. Then it claims once more, which
        fails if the instance was given to somebody else; and so on, since it may be stopped
        while it does that.

        Raises:
            StorageUnavailable: The storage did not answer.
        """
        while (uptime() - self._claimed_at) * 1000 >= self._lease * SURE_OF_LEASE:
            if not self.claim():
                return False
        return True

    def hand_over(self, *, waits: bool = False) -> None:
        """Note that another task takes this one's place, and its claim when it runs.

        Until then nobody renews the lease, and nobody is lost.

        Args:
            waits: Whether it may take any time: there is a gate before its end.

        Raises:
            StorageUnavailable: The storage did not answer.
        """
        running = self._if(Status.RUNNING, token=self.token)
        how = HANDED_TO_GATE if waits else HANDED_OVER
        self.manager.storage.write(self._write([running], {'loss': how + self.loss}))

    def beat_write(self) -> Write:
        """Return what a heartbeat writes: the worker that holds this delivery lives.

        What runs gets a new lease. What waits in the worker's memory is not sent again for
        as long.
        """
        lease = StorageTime(self._lease)
        return self._write(
            [self._if(Status.RUNNING, token=self.token), self._if(Status.SCHEDULED, eta=lease)],
            {'lease': lease, 'spared': 0},
            lease,
        )

    def finish(self, result: Any, log_level: int = 0, *, untold: bool = False) -> bool:
        """End the instance with success; tell whether that counted.

        Args:
            untold: Whether all that is known is the stored result, see :meth:`.Step.finish`.
        """
        cascade = cascade_kwargs(result)
        try:
            kept = self.manager.storage.codec.copy([result, cascade])
        except EncodeError as exc:
            # Celery fails a task whose result its serializer cannot take; so does this.
            logger.error(
                '%s of session %r fails: its task returned what triggers_serializer (%s) '
                'cannot take: %s',
                self.name, self.header['uid'], self.manager.storage.settings.serializer, exc,
            )
            return self.fail('result not serializable', exception_facts(exc), log_level)

        def decide(step: Step, instance: Instance) -> None:
            step.finish(instance, *kept, untold=untold)

        return self._report('success', decide, log_level, needs_token=False)

    def fail(
        self,
        reason: str,
        exception: Mapping[str, Any],
        log_level: int = 0,
        *,
        untold: bool = False,
    ) -> bool:
        """End the instance with a failure; tell whether that counted.

        Args:
            untold: Whether Celery knows nothing of it, see :meth:`.Step.fail`.
        """
        context = storable(self.manager.storage.codec, exception.get('context') or {})
        facts = {**exception, 'context': context}

        def decide(step: Step, instance: Instance) -> None:
            step.fail(instance, reason, facts, untold=untold)

        return self._report(f'failure ({reason})', decide, log_level)

    def lose(self, message: str, *, untold: bool = False) -> bool:
        """Take the instance back from a worker that is gone; tell whether that counted.

        Args:
            untold: Whether Celery knows nothing of it, see :meth:`.Step.fail`.
        """
        facts = lost_worker(message)

        def decide(step: Step, instance: Instance) -> None:
            step.lose(instance, facts, untold=untold)

        return self._report('loss', decide)

    def revoke(self, reason: str, *, untold: bool = False) -> bool:
        """End the instance as revoked; tell whether that counted.

        Args:
            untold: Whether all that is known is the stored result, see :meth:`.Step.finish`.
        """
        return self._report(
            'revocation', lambda step, instance: step.revoke(instance, reason, untold=untold)
        )

    def retry(
        self,
        countdown: float,
        message: Mapping[str, Any] | None = None,
        log_level: int = 0,
        *,
        send: bool = True,
    ) -> bool:
        """Give the instance another attempt; tell whether that counted.

        Args:
            countdown: Seconds before which it must not run.
            message: What its message has, see :class:`Instance`.
            send: Whether it is to be sent; else whoever retries it runs it.
        """

        def decide(step: Step, instance: Instance) -> None:
            step.retry(instance, _eta(step, countdown), message, send=send)

        return self._report('retry', decide, log_level)

    def requeue(self, *, send: bool = False) -> bool:
        """Give the attempt back, to be claimed by another delivery.

        Args:
            send: Whether the message is gone and has to be sent again.
        """
        return self._report('requeue', lambda step, instance: step.requeue(instance, send=send))

    def skip(self, metadata: Mapping[str, Any] | None, log_level: int = 0) -> bool:
        """End the instance as skipped, at its code's wish."""
        facts = storable(self.manager.storage.codec, metadata or {})

        def decide(step: Step, instance: Instance) -> None:
            step.skip(instance, metadata=facts, untold=True)

        return self._report('skip', decide, log_level)

    def replay(
        self,
        replacement_kwargs: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        countdown: float,
        log_level: int = 0,
    ) -> bool:
        """Put a new instance in the place of this one, at its code's wish."""
        facts = storable(self.manager.storage.codec, metadata or {})
        try:
            kwargs = dict(self.manager.storage.codec.copy(dict(replacement_kwargs or {})))
        except EncodeError as exc:
            return self.fail('cannot be replayed', exception_facts(exc), log_level)

        def decide(step: Step, instance: Instance) -> None:
            eta = _eta(step, countdown)
            step.replay(instance, replacement_kwargs=kwargs, metadata=facts, eta=eta)

        return self._report('replay', decide, log_level)

    # ---------------------------------------------------------------- helpers

    def _report(
        self,
        what: str,
        decide: Callable[[Step, Instance], None],
        log_level: int = 0,
        *,
        needs_token: bool = True,
    ) -> bool:
        def checked(step: Step) -> bool:
            instance = self._mine(step, what, needs_token)
            if instance is None:
                return False
            try:
                decide(step, instance)
            except InvalidTransition as exc:
                # The slice is thrown away with what the step did to it so far.
                step.draft.changed = False
                self._ignore(f'{what} ignored: {exc}')
                return False
            instance.log_level = max(instance.log_level, log_level)
            return True

        change = prepare(self.manager, plans.outcome(self.name), checked)
        try:
            outcome = make_patiently(
                change, self.patience, self.unmoved_by,
                f'{self.name} of session {self.header["uid"]!r}: its {what}',
            )
        except StorageUnavailable as exc:
            if not self.patience:
                raise
            logger.error(
                '%s of session %r: its %s could not be stored within %g seconds and is lost, '
                'the instance stays as it is: %s',
                self.name, self.header['uid'], what, self.patience, exc,
            )
            return False
        with suppress(*self.unmoved_by):
            follow_up(self.manager, outcome)
        return bool(outcome.value) or outcome.value is None

    def _mine(self, step: Step, what: str, needs_token: bool) -> Instance | None:
        """Return the instance if this delivery may end it now."""
        instance = step.session.instance(self.name)
        if (
            instance is None
            or step.session.head.incarnation != self.header['incarnation']
            or instance.task_id != self.header['task_id']
        ):
            self._ignore(f'{what} ignored: the instance is gone')
            return None
        if needs_token and self._is_stale(instance, step.now):
            self._ignore(f'{what} ignored: this delivery no longer has the instance')
            return None
        return instance

    def _is_stale(self, instance: Instance, now: int) -> bool:
        """Tell whether the instance is in other hands than this delivery's."""
        if instance.status is Status.RUNNING:
            return instance.token != self.token or (self.by_sweep and instance.lease > now)
        if instance.status is not Status.SCHEDULED:
            # Skipping or replaying what has failed is for people.
            return True
        given_up = self.claimed or (self.token and self.token in instance.lost)
        return bool(given_up) or instance.attempt != self.header['attempt']

    def _ignore(self, message: str) -> None:
        logger.info('%s of session %r: %s', self.name, self.header['uid'], message)


def _eta(step: Step, countdown: float) -> int:
    """Return the storage's time in so many seconds; 0: at once."""
    return step.now + int(countdown * 1000) if countdown > 0 else 0


def uptime() -> float:
    """Return seconds that go on also while the process, or the whole machine, is stopped."""
    clock = getattr(time, 'CLOCK_BOOTTIME', None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)



