"""One change of a session, decided as a whole: firings, outcomes, what people do.

A step works on a :class:`~celery_triggers.engine.session.Session` slice and notes what
it touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery_triggers.engine.cascade import CASCADE_LIMIT, Cascade
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.finalizing import waits_for_the_end
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import AGAIN, Instance, merged
from celery_triggers.engine.limits import Limits
from celery_triggers.engine.names import delayed_name
from celery_triggers.engine.reception import Reception
from celery_triggers.engine.session import (
    Delayed,
    EventRecord,
    FiringRecord,
    Session,
)
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import BY_HAND, UNHAPPY, Event, Status, next_status
from celery_triggers.exceptions import InvalidTransition

#: The reason of a failure whose worker is gone.
WORKER_LOST = 'worker lost'

#: The reason of a failure at a time limit.
TIME_LIMIT = 'time limit'

#: For how many seconds an attempt waits at most that has lost several workers.
MOST_WAIT = 60

#: Reasons of a failure after which a success may still arrive and count.
LOST = frozenset({WORKER_LOST, TIME_LIMIT})


class Step:
    """One atomic change of a session.

    Args:
        session: The slice; it is changed in place.
        now: The storage's time in milliseconds.
        new_id: Makes the task id of a released instance.
        finalizing: Whether ``sessionFinalized`` is fired when the session is settled.
        limits: What the settings allow.

    Attributes:
        draft: What has been changed, to be committed.
        reception: What instances receive.
        cascade: What follows from firings.
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
        self.session = session
        self.draft = Draft(session, now, new_id, limits or Limits())
        self.reception = Reception(self.draft)
        self.cascade = Cascade(self.draft, self.reception, finalizing=finalizing)

    @property
    def now(self) -> int:
        """The storage's time, in milliseconds; it never goes back."""
        return self.draft.now

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
        self.cascade.enqueue(FiringRecord(0, trigger, kwargs, self.now, event_id, depth=depth))
        self.cascade.settle()

    def delay(self, event_id: str, trigger: str, kwargs: dict[str, Any], due: int) -> None:
        """Accept a firing that is to be applied later."""
        self.session.delayed[event_id] = Delayed(trigger, kwargs, due)
        self.draft.dues[delayed_name(event_id)] = due
        self.draft.delayed.add(event_id)
        self.draft.changed = True

    def fire_delayed(self, event_id: str) -> bool:
        """Apply a delayed firing if its time has come; tell whether it has."""
        firing = self.session.delayed_firing(event_id)
        if firing is None or firing.due > self.now:
            return False
        record = self._drop_delayed(event_id)
        record.at = self.now
        self.fire(firing.trigger, firing.kwargs, event_id=event_id)
        record.heard_by = self.draft.records[0].heard_by
        self.draft.remember(event_id, record)
        return True

    def cancel_delayed(self, event_id: str) -> bool:
        """Take back a delayed firing; tell whether there was one. Its id stays taken."""
        if self.session.delayed_firing(event_id) is None:
            return False
        self.draft.remember(event_id, self._drop_delayed(event_id))
        self.draft.changed = True
        return True

    def _drop_delayed(self, event_id: str) -> EventRecord:
        del self.session.delayed[event_id]
        self.draft.dues[delayed_name(event_id)] = 0
        self.draft.delayed.add(event_id)
        record = self.session.events[event_id]
        record.due = 0
        return record

    def finish(
        self, instance: Instance, result: Any, cascade: dict[str, Any], *, untold: bool = False
    ) -> None:
        """End an instance with success; its task's name is fired with ``cascade``.

        Args:
            untold: Whether all that is known is the stored result. Celery stores it before it
                counts the task as a part of its chord, which may have been cut off.
        """
        late = (
            instance.status is Status.FAILED and instance.metadata.get('reason') in LOST
        )
        stopped = self.cascade.too_deep(instance, instance.task)
        if stopped and not late:
            self.draft.advance(instance, Event.FAIL)
            self._unclaim(instance)
            instance.metadata['reason'] = CASCADE_LIMIT
            instance.metadata['exception'] = {'type': 'CascadeLimitExceeded', 'message': stopped}
            # For a person who carries it on, with skip_failed_instance(..., cascade=True).
            instance.metadata['result'] = result
            return
        self.draft.advance(instance, Event.LATE_SUCCESS if late else Event.FINISH)
        self._unclaim(instance)
        instance.metadata['result'] = result
        if untold:
            self._tell_chord(instance)
        self.cascade.fire_end(instance, instance.task, cascade)
        self.cascade.settle()

    def _tell_chord(self, instance: Instance) -> None:
        """Have a gated task counted as a part of its chord, if it is in one.

        Whoever died may have Celery's claim to hand the body on, and then nobody else can
        until that is over.
        """
        if instance.gate is not None and instance.gate.in_chord:
            due = self.now + self.draft.limits.chord_patience
            self.draft.end_gate(instance, due, at_once=False)

    def fail(
        self,
        instance: Instance,
        reason: str,
        exception: Mapping[str, Any],
        *,
        untold: bool = False,
    ) -> None:
        """End an instance with a failure.

        Args:
            reason: What kind of failure it was, in a few words.
            exception: ``{"type", "message", "traceback", "context"}``.
            untold: Whether Celery knows nothing of it, so that it has told nobody who waits
                for the result.
        """
        self.draft.advance(instance, Event.FAIL)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        instance.metadata['exception'] = dict(exception)
        if untold:
            self.cascade.tell_end(None, instance)
        facts = {key: exception[key] for key in ('type', 'message') if key in exception}
        self.cascade.fire_outcome(instance, 'failed', {'reason': reason, **facts})
        self.cascade.settle()

    def revoke(self, instance: Instance, reason: str, *, untold: bool = False) -> None:
        """End an instance as revoked.

        Args:
            untold: As for :meth:`finish`.
        """
        waited = instance.status is Status.UNSTARTED
        self.draft.advance(instance, Event.REVOKE)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        if waited:
            self.cascade.tell_end(None, instance)
        elif untold:
            self._tell_chord(instance)
        self.cascade.fire_outcome(instance, 'revoked', {'reason': reason})
        self.cascade.settle()

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
            message: What its message has, see :class:`Instance`.
            send: Whether it is to be sent; else whoever retries it runs it.
        """
        self.draft.advance(instance, Event.RETRY)
        self._unclaim(instance)
        instance.attempt += 1
        instance.sends, instance.eta, instance.lost = 0, eta, []
        instance.message = dict(message or {})
        self.draft.schedule(instance, send=send)

    def requeue(self, instance: Instance, *, send: bool = False) -> None:
        """Give a running instance's attempt back, as if it had not been claimed.

        Args:
            send: Whether its message is gone and has to be sent again.
        """
        self.draft.advance(instance, Event.REQUEUE)
        self._unclaim(instance)
        instance.sends, instance.eta = 0, 0
        self.draft.schedule(instance, send=send)

    def lose(
        self, instance: Instance, exception: Mapping[str, Any], *, untold: bool = False
    ) -> None:
        """Take an instance back from a worker that is gone.

        What its claim said becomes of it: it is run again, for so long as fewer workers
        than ``max_deliveries`` were lost with the attempt, replayed, or failed. One that
        had not been claimed is sent again, since its code has not started.

        Args:
            exception, untold: As for :meth:`fail`.
        """
        next_status(instance.name, instance.status, Event.FAIL)
        known = self.session.config_of(instance) is not None
        most = self.draft.limits.max_deliveries
        if instance.status is Status.SCHEDULED and instance.sends < most:
            self.resend(instance)
        elif instance.policy == AGAIN and max(len(instance.lost) + 1, instance.sends) < most:
            self.draft.advance(instance, Event.REQUEUE)
            # What has killed several workers lets others live for a while.
            wait = min(2 ** len(instance.lost), MOST_WAIT) * 1000 if instance.lost else 0
            instance.lost = [*instance.lost, instance.token]
            self._unclaim(instance)
            instance.eta = self.now + wait if wait else 0
            self.draft.schedule(instance)
            self.cascade.settle()
        elif instance.replays_when_lost and known:
            facts = {'reason': WORKER_LOST, 'exception': dict(exception)}
            self.replay(instance, metadata=facts)
        else:
            self.fail(instance, WORKER_LOST, exception, untold=untold)

    def resend(self, instance: Instance) -> None:
        """Send a scheduled instance again, whose message is gone."""
        self.draft.touch(instance)
        self.draft.schedule(instance)

    @staticmethod
    def _unclaim(instance: Instance) -> None:
        instance.token, instance.lease, instance.spared = '', 0, 0

    def skip(
        self,
        instance: Instance,
        *,
        metadata: Mapping[str, Any] | None = None,
        cascade: dict[str, Any] | None = None,
        untold: bool = False,
    ) -> None:
        """End an instance as skipped; ``cascade`` fires its task's name with these kwargs.

        Args:
            untold: Whether Celery has told nobody that it ended.
        """
        self.draft.advance(instance, Event.SKIP)
        self.draft.skipped.append((instance.name, cascade is not None))
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        if untold:
            self.cascade.tell_end(None, instance)
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        self.cascade.settle()

    def replay(
        self,
        instance: Instance,
        *,
        replacement_kwargs: Mapping[str, dict[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        eta: int = 0,
    ) -> None:
        """Release a new instance in the place of this one; ``unless`` is not asked again."""
        self.draft.advance(instance, Event.REPLAY)
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        new = self.draft.clone(instance)
        new.received.update(replacement_kwargs or {})
        new.eta = eta
        task = self.session.config_of(instance)
        if task is None:
            raise InvalidTransition(
                f'{instance.name} cannot be replayed: the session no longer has the '
                f'trigger task {instance.task!r}',
                instance=instance.name,
                status=instance.status.value,
                wanted=Event.REPLAY.value,
            )
        self.draft.replayed.append(new.name)
        self.cascade.release(task, new)
        self.cascade.settle()

    def create(self, task: TaskConfig) -> Instance:
        """Make a task's next instance by hand: it receives the latest firings and is judged.

        The whole session must be loaded.
        """
        instance = self.reception.create(task, None)
        self.cascade.judge(task, instance)
        self.cascade.settle()
        return instance

    def wait_at_gate(
        self, name: str, task_id: str, gate: Gate, *, until: int = 0, fresh: bool = False
    ) -> Instance:
        """Make the instance of a gate and judge it.

        Where its condition has filters the whole session must be loaded.

        Args:
            until: Its deadline, in milliseconds; 0: none but what ``within`` says.
            fresh: Whether only what is fired from now on counts.
        """
        task = gate.config(name)
        gate.aside = gate.template or waits_for_the_end(self.session.configuration, task)
        instance = self.draft.next_instance(name, gate, task_id)
        instance.until = until
        self.reception.filter_past({
            trigger: {leaf.where for leaf in task.leaves_of(trigger) if leaf.where is not None}
            for trigger in task.triggers
        })
        if fresh:
            for leaf in task.counters:
                known = self.reception.known(leaf)
                gate.since[leaf.key] = known.count if known is not None else 0
        else:
            self.reception.receive_past(task, instance)
        self.reception.wait(task, instance)
        self.cascade.judge(task, instance)
        self.cascade.settle()
        return instance

    def expire(self, instance: Instance) -> bool:
        """End a waiting instance whose deadline has passed; tell whether it has."""
        task = self.session.config_of(instance)
        if not 0 < instance.deadline(task) <= self.now:
            return False
        self.cascade.expire(task, instance)
        self.cascade.settle()
        return True

    def copy(self, task: TaskConfig, instance: Instance) -> Instance:
        """Make another instance with what this one received, and judge it.

        The whole session must be loaded.
        """
        new = self.draft.clone(instance)
        self.reception.wait(task, new)
        self.cascade.judge(task, new)
        self.cascade.settle()
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
        self.draft.recount(instance, before)
        if before not in UNHAPPY:
            # What failed or was revoked has told that it did.
            self.cascade.tell_end(self.session.config_of(instance), instance)
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        if status in UNHAPPY:
            self.cascade.fire_outcome(instance, status.value, {'reason': 'by hand'})
        elif status is Status.ABANDONED and before is Status.UNSTARTED:
            task = self.session.config_of(instance)
            self.cascade.fire_abandoned(task, instance, 'by hand')
        self.cascade.settle()

    def _fire_by_hand(self, instance: Instance, cascade: dict[str, Any]) -> None:
        """Fire a task's name because a person says so, which is the way out of a limit."""
        self.cascade.enqueue(
            FiringRecord(0, instance.task, cascade, self.now, None, instance.name)
        )


def cascade_kwargs(result: Any) -> dict[str, Any]:
    """Return the kwargs of a cascade: a mapping as it is, other results wrapped."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return merged({}, result)
    return {'result': result}
