"""What a firing leads to within one change: instances are judged, and their ends fire in turn.

Nothing is done here: a storage commits the change, and only then is anything sent that it
released.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from celery_triggers.engine.cycles import loop_through
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.finalizing import is_settled
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.names import SESSION_FINALIZED, outcome_trigger
from celery_triggers.engine.reception import Reception
from celery_triggers.engine.session import FiringRecord
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Event, Status

__all__ = ['CASCADE_LIMIT', 'Cascade']

#: The key of an instance's metadata which says that a loop was stopped at it.
CASCADE_LIMIT = 'cascade limit'


class Cascade:
    """Applies firings, first in, first out, until nothing follows from them any more.

    Args:
        draft: What is changed.
        reception: Hands firings to instances.
        finalizing: Whether ``sessionFinalized`` is fired when the session is settled.
    """

    def __init__(self, draft: Draft, reception: Reception, *, finalizing: bool = False):
        self._draft = draft
        self._reception = reception
        self.finalizing = finalizing
        self._queue: deque[FiringRecord] = deque()

    def settle(self) -> None:
        """Apply what is queued until nothing is left, then finalize if it is time."""
        while True:
            while self._queue:
                self._apply(self._queue.popleft())
            if not (self.finalizing and self._draft.changed and is_settled(self._draft.session)):
                return
            self._draft.session.head.finalized = True
            self.enqueue(FiringRecord(0, SESSION_FINALIZED, {}, self._draft.now))

    def enqueue(self, firing: FiringRecord) -> None:
        self._queue.append(firing)
        self._draft.changed = True

    def fire_end(self, instance: Instance, trigger: str, kwargs: dict[str, Any]) -> None:
        """Fire what an instance's end fires, unless that went on for too long."""
        stopped = self.too_deep(instance, trigger)
        if stopped:
            instance.metadata[CASCADE_LIMIT] = stopped
        else:
            self.enqueue(
                FiringRecord(
                    0, trigger, kwargs, self._draft.now, None, instance.name,
                    depth=instance.cascade + 1,
                )
            )

    def too_deep(self, instance: Instance, trigger: str) -> str | None:
        """Say which loop a firing at the end of an instance would carry on too far."""
        session = self._draft.session
        configuration = session.configuration
        if instance.cascade < self._draft.limits.max_cascade:
            return None
        if not configuration.listeners(trigger) and not session.gates_waiting_for(trigger):
            return None
        loop = ' -> '.join(loop_through(configuration, instance.task) or [instance.task, '...'])
        message = (
            f'{trigger!r} is not fired after {instance.name}: {instance.cascade} cascades in a '
            f'row led here, as many as triggers_max_cascade allows, in the loop {loop}'
        )
        self._draft.stopped.append(message)
        return message

    def begin(self) -> None:
        """Make the first instances of the tasks that have a deadline, which counts from now.

        That is once in a session's life: at its first firing, or before.
        """
        if not self._draft.session.head.has_begun:
            self.create_with_deadline()

    def create_with_deadline(self) -> None:
        """Make the first instances that are missing of the tasks that have a deadline."""
        for task in self._draft.session.configuration.with_deadline:
            if not self._draft.session.counts_of(task.name).total:
                self.judge(task, self._reception.create(task, None))

    def _apply(self, firing: FiringRecord) -> None:
        session = self._draft.session
        self.begin()
        session.head.firings += 1
        firing.number = session.head.firings
        self._draft.applying = firing
        self._reception.count(firing)
        gates: dict[str, list[Instance]] = {}
        for instance in session.gates_waiting_for(firing.trigger):
            gates.setdefault(instance.task, []).append(instance)
        tasks = {task.name: task for task in session.configuration.listeners(firing.trigger)}
        for name in sorted({*tasks, *gates}):
            firing.heard_by.append(name)
            reached = self._reception.reached(tasks[name], firing) if name in tasks else []
            for instance in reached:
                self.judge(tasks[name], instance)
            for instance in gates.get(name, ()):
                self._pass_gate(instance, firing)
        self._draft.records.append(firing)
        self._draft.applying = None

    def _pass_gate(self, instance: Instance, firing: FiringRecord) -> None:
        """Let a firing reach a gate that waits for it."""
        assert instance.gate is not None
        if instance.status is not Status.UNSTARTED:
            # Something of this very firing has ended it.
            return
        task = instance.gate.config(instance.task)
        overdue = 0 < instance.deadline(task) <= self._draft.now
        if instance.gate.template and firing.trigger == task.and_every and not overdue:
            self.judge(task, self._reception.copy_of(task, instance, firing))
        if firing.trigger in instance.waits_for(task):
            every = task.every is not None and task.every.key not in instance.received
            self._reception.give(task, instance, firing, every=every and not instance.gate.template)
            self.judge(task, instance)

    def judge(self, task: TaskConfig, instance: Instance) -> None:
        """Decide about a waiting instance: ``unless`` comes before ``after``."""
        if instance.status is not Status.UNSTARTED:
            return
        if 0 < instance.deadline(task) <= self._draft.now:
            self.expire(task, instance)
        elif self._draft.session.head.cancelled is not None:
            self.abandon(task, instance, f'cancelled: {self._draft.session.head.cancelled}')
        elif task.unless.holds(instance.received):
            leaves = dict.fromkeys(task.unless.leaves())
            held = ', '.join(leaf.key for leaf in leaves if leaf.key in instance.received)
            self.abandon(task, instance, f'unless: {held}')
        elif instance.gate is not None and instance.gate.template:
            return
        elif task.wanted.holds(instance.received):
            self.release(task, instance)

    def release(self, task: TaskConfig, instance: Instance) -> None:
        self._draft.advance(instance, Event.RELEASE)
        # A gate has the id that whoever waits for its result knows.
        instance.task_id = instance.task_id or self._draft.new_id()
        self._put_off(task, instance)
        self._draft.released.append(instance.name)
        if self._draft.applying is not None:
            self._draft.applying.released.append(instance.name)
            instance.cascade = self._draft.applying.depth
        self._draft.schedule(instance)

    def _put_off(self, task: TaskConfig, instance: Instance) -> None:
        """Put off a released instance whose signature has a countdown or an ETA."""
        gate = instance.gate
        delay, eta = (gate.delay, gate.eta) if gate is not None else (task.delay, 0)
        eta = max(instance.eta, eta, self._draft.now + delay if delay else 0)
        instance.eta = eta if eta > self._draft.now else instance.eta

    def abandon(self, task: TaskConfig | None, instance: Instance, reason: str) -> None:
        self._draft.advance(instance, Event.ABANDON)
        instance.metadata['reason'] = reason
        self.tell_end(task, instance)
        self.fire_abandoned(task, instance, reason)

    def expire(self, task: TaskConfig | None, instance: Instance) -> None:
        self._draft.advance(instance, Event.EXPIRE)
        instance.metadata['reason'] = 'deadline'
        self.tell_end(task, instance)
        self.fire_abandoned(task, instance, 'deadline', 'expired')

    def tell_end(self, task: TaskConfig | None, instance: Instance) -> None:
        """Have the result of a gate ended that will not run."""
        if instance.gate is not None:
            if task is not None:
                instance.metadata['missing'] = instance.missing(task)
            self._draft.end_gate(instance, self._draft.now + self._draft.limits.dispatch_grace)

    def fire_abandoned(
        self, task: TaskConfig | None, instance: Instance, reason: str, outcome: str = 'abandoned'
    ) -> None:
        self._draft.abandoned.append(instance.name)
        missing = instance.missing(task) if task else []
        details = {'reason': reason, 'missing': missing, 'received': sorted(instance.received)}
        self.fire_outcome(instance, outcome, details)

    def fire_outcome(self, instance: Instance, outcome: str, details: dict[str, Any]) -> None:
        self.fire_end(
            instance,
            outcome_trigger(instance.task, outcome),
            {'instance': instance.name, **details},
        )
