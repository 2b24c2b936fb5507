"""The firing step: what one change of a session leads to, decided as a whole.

A step works on a :class:`~celery_triggers.engine.session.Session` slice and notes what
it touched. Nothing is done here: a storage commits the step, and only then is anything
sent that the step released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

from celery_triggers.engine.configuration import Configuration, TaskConfig
from celery_triggers.engine.cycles import loop_through
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.finalizing import is_settled
from celery_triggers.engine.instances import AGAIN, Instance, merged
from celery_triggers.engine.limits import Limits
from celery_triggers.engine.names import SESSION_FINALIZED, outcome_trigger
from celery_triggers.engine.session import EventRecord, FiringRecord, Latest, Session
from celery_triggers.engine.transitions import BY_HAND, UNHAPPY, Event, Status, next_status
from celery_triggers.exceptions import InvalidTransition

#: The reason of a failure whose worker is gone.
WORKER_LOST = 'worker lost'

#: The reason of a failure at a time limit.
TIME_LIMIT = 'time limit'

#: Reasons of a failure after which a success may still arrive and count.
LOST = frozenset({WORKER_LOST, TIME_LIMIT})

#: The reason of a failure at which a loop was stopped.
CASCADE_LIMIT = 'cascade limit'


class Step(Draft):
    """One atomic change of a session.

    Args:
        session: The slice; it is changed in place.
        now: The storage's time in milliseconds.
        new_id: Makes the task id of a released instance.
        finalizing: Whether ``sessionFinalized`` is fired when the session is settled.
        limits: What the settings allow.

    Attributes:
        to_send: The names of instances whose messages are to be sent after the commit.
        released, abandoned: The names of instances, in the order in which it happened.
        replayed: The names of instances that took the place of others.
        skipped: The names of instances that were skipped, and whether they cascaded.
        records: The firings that were applied, for the history.
        events: What the step did, under the ids that stand for it.
    """

    def __init__(
        self,
        session: Session,
        now: int,
        new_id: Callable[[], str],
        *,
        finalizing: bool = False,
        limits: Limits | None = None,
    ):
        super().__init__(session, now)
        self.new_id = new_id
        self.finalizing = finalizing
        self.limits = limits or Limits()
        self.to_send: list[str] = []
        self.released: list[str] = []
        self.abandoned: list[str] = []
        self.replayed: list[str] = []
        self.skipped: list[tuple[str, bool]] = []
        self.records: list[FiringRecord] = []
        self.fired: set[str] = set()
        self.events: dict[str, EventRecord] = {}
        self._queue: deque[FiringRecord] = deque()
        self._applying: FiringRecord | None = None

    # ------------------------------------------------------------------ firing

    def fire(
        self,
        trigger: str,
        kwargs: dict[str, Any],
        *,
        event_id: str | None = None,
        depth: int = 0,
    ) -> None:
        """Apply a firing and everything that it leads to within this step.

        Args:
            depth: How many cascades in a row led to it.
        """
        self._enqueue(FiringRecord(0, trigger, kwargs, self.now, event_id, depth=depth))
        self.settle()

    def settle(self) -> None:
        """Apply what is queued until nothing is left, then finalize if it is time."""
        while True:
            while self._queue:
                self._apply(self._queue.popleft())
            if not (self.finalizing and self.changed and is_settled(self.session)):
                return
            self.session.head.finalized = True
            self._enqueue(FiringRecord(0, SESSION_FINALIZED, {}, self.now))

    def remember(self, event_id: str, record: EventRecord) -> None:
        """Store under an id what came of this step."""
        record.created = list(self.created)
        record.released = list(self.released)
        record.abandoned = list(self.abandoned)
        self.events[event_id] = record

    def _enqueue(self, firing: FiringRecord) -> None:
        self._queue.append(firing)
        self.changed = True

    def _fire_end(self, instance: Instance, trigger: str, kwargs: dict[str, Any]) -> None:
        """Fire what an instance's end fires, unless that went on for too long."""
        stopped = self._too_deep(instance, trigger)
        if stopped:
            instance.metadata[CASCADE_LIMIT] = stopped
        else:
            self._enqueue(
                FiringRecord(
                    0, trigger, kwargs, self.now, None, instance.name, depth=instance.cascade + 1
                )
            )

    def _too_deep(self, instance: Instance, trigger: str) -> str | None:
        """Say which loop a firing at the end of an instance would carry on too far."""
        configuration = self.session.configuration
        if instance.cascade < self.limits.max_cascade or not configuration.listeners(trigger):
            return None
        loop = ' -> '.join(loop_through(configuration, instance.task) or [instance.task, '...'])
        return (
            f'{trigger!r} is not fired: {instance.cascade} cascades in a row led here, as many '
            f'as triggers_max_cascade allows, in the loop {loop}'
        )

    def _apply(self, firing: FiringRecord) -> None:
        session = self.session
        session.head.firings += 1
        firing.number = session.head.firings
        self._applying = firing
        known = session.latest_of(firing.trigger)
        count = known.count + 1 if known else 1
        for task in session.configuration.listeners(firing.trigger):
            firing.heard_by.append(task.name)
            for instance in self._reached(task, firing):
                self._judge(task, instance)
        session.latest[firing.trigger] = Latest(count, firing.kwargs)
        self.fired.add(firing.trigger)
        self.records.append(firing)
        self._applying = None

    def _reached(self, task: TaskConfig, firing: FiringRecord) -> list[Instance]:
        """Give the firing to the instances of a task that it concerns."""
        trigger, kwargs = firing.trigger, firing.kwargs
        if not self.session.counts_of(task.name).total:
            return [self._create(task, trigger, kwargs)]
        takers = self.session.waiting_for(trigger, task)
        if trigger == task.and_every:
            if not takers:
                return [self._create(task, trigger, kwargs)]
            # Each payload of an andEvery reaches exactly one instance.
            takers = takers[:1]
        for instance in takers:
            instance.receive(task, trigger, kwargs)
            self.touch(instance)
            if trigger not in instance.waits_for(task):
                self._remove_wait(trigger, instance)
        return takers

    def _create(
        self, task: TaskConfig, trigger: str | None, kwargs: dict[str, Any] | None
    ) -> Instance:
        """Make the next instance of a task: past firings first, then this one."""
        instance = self._next_instance(task.name)
        instance.cascade = self._applying.depth if self._applying is not None else 0
        self._receive_past(task, instance, but=trigger)
        if trigger is not None and kwargs is not None:
            instance.receive(task, trigger, kwargs)
        self._set_waits(instance, instance.waits_for(task))
        return instance

    def _judge(self, task: TaskConfig, instance: Instance) -> None:
        """Decide about a waiting instance: ``unless`` comes before ``after``."""
        if instance.status is not Status.UNSTARTED:
            return
        if self.session.head.cancelled is not None:
            self._abandon(task, instance, f'cancelled: {self.session.head.cancelled}')
        elif task.unless.holds(instance.received):
            held = ', '.join(name for name in task.unless if name in instance.received)
            self._abandon(task, instance, f'unless: {held}')
        elif task.wanted.holds(instance.received):
            self._release(task, instance)

    def _release(self, task: TaskConfig, instance: Instance) -> None:
        self._advance(instance, Event.RELEASE)
        instance.task_id = self.new_id()
        self.released.append(instance.name)
        if self._applying is not None:
            self._applying.released.append(instance.name)
            instance.cascade = self._applying.depth
        self._schedule(instance)

    def _schedule(self, instance: Instance, *, send: bool = True) -> None:
        """Give a scheduled instance its due date, and have it sent if it runs soon."""
        soon = self.now + self.limits.dispatch_grace
        if instance.eta > soon:
            self.dues[instance.name] = instance.eta
            return
        # One that has to wait a little is sent with its ETA, and looked at after that.
        self.dues[instance.name] = max(soon, instance.eta + self.limits.dispatch_grace)
        if send:
            self.to_send.append(instance.name)

    def _abandon(self, task: TaskConfig | None, instance: Instance, reason: str) -> None:
        self._advance(instance, Event.ABANDON)
        instance.metadata['reason'] = reason
        self._fire_abandoned(task, instance, reason)

    def _fire_abandoned(self, task: TaskConfig | None, instance: Instance, reason: str) -> None:
        self.abandoned.append(instance.name)
        missing = instance.missing(task) if task else []
        details = {'reason': reason, 'missing': missing, 'received': sorted(instance.received)}
        self._fire_outcome(instance, 'abandoned', details)

    def _fire_outcome(self, instance: Instance, outcome: str, details: dict[str, Any]) -> None:
        self._fire_end(
            instance,
            outcome_trigger(instance.task, outcome),
            {'instance': instance.name, **details},
        )

    # ---------------------------------------------------------------- outcomes

    def finish(self, instance: Instance, result: Any, cascade: dict[str, Any]) -> None:
        """End an instance with success; its task's name is fired with ``cascade``."""
        late = (
            instance.status is Status.FAILED and instance.metadata.get('reason') in LOST
        )
        stopped = self._too_deep(instance, instance.task)
        if stopped and not late:
            self._advance(instance, Event.FAIL)
            self._unclaim(instance)
            instance.metadata['reason'] = CASCADE_LIMIT
            instance.metadata['exception'] = {'type': 'CascadeLimitExceeded', 'message': stopped}
            return
        self._advance(instance, Event.LATE_SUCCESS if late else Event.FINISH)
        self._unclaim(instance)
        instance.metadata['result'] = result
        self._fire_end(instance, instance.task, cascade)
        self.settle()

    def fail(self, instance: Instance, reason: str, exception: Mapping[str, Any]) -> None:
        """End an instance with a failure.

        Args:
            reason: What kind of failure it was, in a few words.
            exception: ``{"type", "message", "traceback", "context"}``.
        """
        self._advance(instance, Event.FAIL)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        instance.metadata['exception'] = dict(exception)
        facts = {key: exception[key] for key in ('type', 'message') if key in exception}
        self._fire_outcome(instance, 'failed', {'reason': reason, **facts})
        self.settle()

    def revoke(self, instance: Instance, reason: str) -> None:
        """End an instance as revoked."""
        self._advance(instance, Event.REVOKE)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        self._fire_outcome(instance, 'revoked', {'reason': reason})
        self.settle()

    def retry(
        self,
        instance: Instance,
        eta: int,
        message: Mapping[str, Any] | None = None,
        *,
        send: bool = True,
    ) -> None:
        """Give a running instance another attempt.

        Args:
            eta: Before when it must not run, in milliseconds; 0: at once.
            message: ``{"args", "kwargs", "options"}`` of its message.
            send: Whether it is to be sent; else whoever retries it runs it.
        """
        self._advance(instance, Event.RETRY)
        self._unclaim(instance)
        instance.attempt += 1
        instance.sends, instance.eta, instance.lost = 0, eta, []
        instance.message = dict(message or {})
        self._schedule(instance, send=send)

    def requeue(self, instance: Instance, *, send: bool = False) -> None:
        """Give a running instance's attempt back, as if it had not been claimed.

        Args:
            send: Whether its message is gone and has to be sent again.
        """
        self._advance(instance, Event.REQUEUE)
        self._unclaim(instance)
        instance.sends, instance.eta = 0, 0
        self._schedule(instance, send=send)

    def lose(self, instance: Instance, exception: Mapping[str, Any]) -> None:
        """Take a running instance back from a worker that is gone.

        What its claim said becomes of it: it is run again, for so long as fewer workers
        than ``max_deliveries`` were lost with the attempt, replayed, or failed.

        Args:
            exception: As for :meth:`fail`.
        """
        next_status(instance.name, instance.status, Event.REQUEUE)
        known = instance.task in self.session.configuration
        if instance.loss == AGAIN and len(instance.lost) + 1 < self.limits.max_deliveries:
            self._advance(instance, Event.REQUEUE)
            instance.lost = [*instance.lost, instance.token]
            self._unclaim(instance)
            instance.eta = 0
            self._schedule(instance)
            self.settle()
        elif instance.replays_when_lost and known:
            facts = {'reason': WORKER_LOST, 'exception': dict(exception)}
            self.replay(instance, metadata=facts)
        else:
            self.fail(instance, WORKER_LOST, exception)

    def resend(self, instance: Instance) -> None:
        """Send a scheduled instance again, whose message is gone."""
        self.touch(instance)
        self._schedule(instance)

    @staticmethod
    def _unclaim(instance: Instance) -> None:
        instance.token, instance.lease, instance.spared = '', 0, 0

    def skip(
        self,
        instance: Instance,
        *,
        metadata: Mapping[str, Any] | None = None,
        cascade: dict[str, Any] | None = None,
    ) -> None:
        """End an instance as skipped; ``cascade`` fires its task's name with these kwargs."""
        self._advance(instance, Event.SKIP)
        self.skipped.append((instance.name, cascade is not None))
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        self.settle()

    def replay(
        self,
        instance: Instance,
        *,
        replacement_kwargs: Mapping[str, dict[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        eta: int = 0,
    ) -> Instance:
        """Release a new instance in the place of this one; ``unless`` is not asked again."""
        self._advance(instance, Event.REPLAY)
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        new = self.clone(instance)
        new.received.update(replacement_kwargs or {})
        new.eta = eta
        task = self.session.configuration.get(instance.task)
        if task is None:
            raise InvalidTransition(
                f'{instance.name} cannot be replayed: the session no longer has the '
                f'trigger task {instance.task!r}',
                instance=instance.name,
                status=instance.status.value,
                wanted=Event.REPLAY.value,
            )
        self.replayed.append(new.name)
        self._release(task, new)
        self.settle()
        return new

    def create(self, task: TaskConfig) -> Instance:
        """Make a task's next instance by hand: it receives the latest firings and is judged.

        The whole session must be loaded.
        """
        instance = self._create(task, None, None)
        self._judge(task, instance)
        self.settle()
        return instance

    def copy(self, task: TaskConfig, instance: Instance) -> Instance:
        """Make another instance with what this one received, and judge it.

        The whole session must be loaded.
        """
        new = self.clone(instance)
        self._set_waits(new, new.waits_for(task))
        self._judge(task, new)
        self.settle()
        return new

    def set_status(
        self,
        instance: Instance,
        status: Status,
        *,
        metadata: Mapping[str, Any] | None = None,
        cascade: dict[str, Any] | None = None,
    ) -> None:
        """Set a status by hand, as far as the table lets a person do so."""
        if instance.status not in BY_HAND.get(status, ()):
            raise InvalidTransition(
                f'{instance.name} is {instance.status}; it cannot be set to {status} by hand',
                instance=instance.name,
                status=instance.status.value,
                wanted=status.value,
            )
        before = instance.status
        instance.move(status, self.now)
        self._unclaim(instance)
        if status in (Status.ABANDONED, Status.FAILED, Status.REVOKED):
            instance.metadata['reason'] = 'by hand'
        instance.metadata.update(metadata or {})
        self._recount(instance, before)
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        if status in UNHAPPY:
            self._fire_outcome(instance, status.value, {'reason': 'by hand'})
        elif status is Status.ABANDONED and before is Status.UNSTARTED:
            task = self.session.configuration.get(instance.task)
            self._fire_abandoned(task, instance, 'by hand')
        self.settle()

    def _fire_by_hand(self, instance: Instance, cascade: dict[str, Any]) -> None:
        """Fire a task's name because a person says so, which is the way out of a limit."""
        self._enqueue(
            FiringRecord(0, instance.task, cascade, self.now, None, instance.name)
        )

    # ----------------------------------------------------------- configuration

    def reconfigure(
        self, configuration: Configuration, *, apply_past: bool, named: Collection[str] = ()
    ) -> None:
        """Change the session's configuration and look again at what waits.

        The whole session must be loaded.

        Args:
            apply_past: Whether past firings reach what waits, and the tasks in ``named``
                that have no instance.
        """
        old = self.session.configuration
        self.session.configuration = self.new_configuration = configuration
        self.session.head.digest = configuration.digest
        self.changed = True
        for instance in self._unstarted():
            task = configuration.get(instance.task)
            if task is None:
                self._set_waits(instance, set())
                self._abandon(old.get(instance.task), instance, 'removed')
                continue
            if apply_past:
                self._receive_past(task, instance)
            self.touch(instance)
            self._set_waits(instance, instance.waits_for(task))
            self._judge(task, instance)
        if apply_past:
            self._create_from_past(named)
        self.settle()

    def _receive_past(
        self, task: TaskConfig, instance: Instance, but: str | None = None
    ) -> None:
        for trigger in sorted(task.triggers - {task.and_every, but}):
            past = self.session.latest_of(trigger)
            if past is not None:
                instance.receive(task, trigger, past.kwargs)

    def _create_from_past(self, names: Collection[str]) -> None:
        """Make the instances that these trigger tasks would have had from past firings."""
        for name in sorted(names):
            task = self.session.configuration[name]
            if self.session.counts_of(name).total:
                continue
            payloads = [r.kwargs for r in self.session.history if r.trigger == task.and_every]
            for kwargs in payloads:
                self._judge(task, self._create(task, task.and_every, kwargs))
            if not payloads and any(self.session.latest_of(t) for t in task.triggers):
                self._judge(task, self._create(task, None, None))

    def cancel(self, reason: str) -> None:
        """Abandon what waits, now and later; the whole session must be loaded."""
        self.session.head.cancelled = reason
        self.changed = True
        for instance in self._unstarted():
            task = self.session.configuration.get(instance.task)
            self._abandon(task, instance, f'cancelled: {reason}')
        self.settle()


def cascade_kwargs(result: Any) -> dict[str, Any]:
    """Return the kwargs of a cascade: a mapping as it is, other results wrapped."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return merged({}, result)
    return {'result': result}
