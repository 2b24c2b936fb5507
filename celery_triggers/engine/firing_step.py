"""The firing step: what a firing leads to within one change of a session.

Nothing is done here: a storage commits the step, and only then is anything sent that the
step released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from typing import Any

from celery_triggers.engine.conditions import Kwarg, On
from celery_triggers.engine.configuration import TaskConfig
from celery_triggers.engine.cycles import loop_through
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.filters import matches
from celery_triggers.engine.finalizing import is_settled, waits_for_the_end
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.limits import Limits
from celery_triggers.engine.names import SESSION_FINALIZED, delayed_name, outcome_trigger
from celery_triggers.engine.session import Delayed, EventRecord, FiringRecord, Latest, Session
from celery_triggers.engine.transitions import Event, Status

#: The key of an instance's metadata which says that a loop was stopped at it.
CASCADE_LIMIT = 'cascade limit'


class FiringStep(Draft):
    """The part of a step that applies firings.

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
        stopped: Which loops went on for too long, in a sentence each.
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
        self.stopped: list[str] = []
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

    def delay(self, event_id: str, trigger: str, kwargs: dict[str, Any], due: int) -> None:
        """Accept a firing that is to be applied later."""
        self.session.delayed[event_id] = Delayed(trigger, kwargs, due)
        self.dues[delayed_name(event_id)] = due
        self.delayed.add(event_id)
        self.changed = True

    def fire_delayed(self, event_id: str) -> bool:
        """Apply a delayed firing if its time has come; tell whether it has."""
        firing = self.session.delayed_firing(event_id)
        if firing is None or firing.due > self.now:
            return False
        record = self._drop_delayed(event_id)
        record.at = self.now
        self.fire(firing.trigger, firing.kwargs, event_id=event_id)
        record.heard_by = self.records[0].heard_by
        self.remember(event_id, record)
        return True

    def cancel_delayed(self, event_id: str) -> bool:
        """Take back a delayed firing; tell whether there was one. Its id stays taken."""
        if self.session.delayed_firing(event_id) is None:
            return False
        self.remember(event_id, self._drop_delayed(event_id))
        self.changed = True
        return True

    def _drop_delayed(self, event_id: str) -> EventRecord:
        del self.session.delayed[event_id]
        self.dues[delayed_name(event_id)] = 0
        self.delayed.add(event_id)
        record = self.session.events[event_id]
        record.due = 0
        return record

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
        if instance.cascade < self.limits.max_cascade:
            return None
        if not configuration.listeners(trigger) and not self.session.gates_waiting_for(trigger):
            return None
        loop = ' -> '.join(loop_through(configuration, instance.task) or [instance.task, '...'])
        message = (
            f'{trigger!r} is not fired after {instance.name}: {instance.cascade} cascades in a '
            f'row led here, as many as triggers_max_cascade allows, in the loop {loop}'
        )
        self.stopped.append(message)
        return message

    def begin(self) -> None:
        """Make the first instances of the tasks that have a deadline, which counts from now.

        That is once in a session's life: at its first firing, or before.
        """
        if not self.session.head.has_begun:
            self._create_with_deadline()

    def _create_with_deadline(self) -> None:
        """Make the first instances that are missing of the tasks that have a deadline."""
        for task in self.session.configuration.with_deadline:
            if not self.session.counts_of(task.name).total:
                self._judge(task, self._create(task, None))

    def _apply(self, firing: FiringRecord) -> None:
        session = self.session
        self.begin()
        session.head.firings += 1
        firing.number = session.head.firings
        self._applying = firing
        self._count(firing)
        gates: dict[str, list[Instance]] = {}
        for instance in session.gates_waiting_for(firing.trigger):
            gates.setdefault(instance.task, []).append(instance)
        tasks = {task.name: task for task in session.configuration.listeners(firing.trigger)}
        for name in sorted({*tasks, *gates}):
            firing.heard_by.append(name)
            reached = self._reached(tasks[name], firing) if name in tasks else []
            for instance in reached:
                self._judge(tasks[name], instance)
            for instance in gates.get(name, ()):
                self._pass_gate(instance, firing)
        self.records.append(firing)
        self._applying = None

    def _pass_gate(self, instance: Instance, firing: FiringRecord) -> None:
        """Let a firing reach a gate that waits for it."""
        assert instance.gate is not None
        if instance.status is not Status.UNSTARTED:
            # Something of this very firing has ended it.
            return
        task = instance.gate.config(instance.task)
        overdue = 0 < instance.deadline(task) <= self.now
        if instance.gate.template and firing.trigger == task.and_every and not overdue:
            self._judge(task, self._copy_of(task, instance, firing))
        if firing.trigger in instance.waits_for(task):
            every = task.every is not None and task.every.key not in instance.received
            self._give(task, instance, firing, every=every and not instance.gate.template)
            self._judge(task, instance)

    def _copy_of(self, task: TaskConfig, template: Instance, firing: FiringRecord) -> Instance:
        """Make the instance that a firing of a gate's ``andEvery`` asks for."""
        assert template.gate is not None
        gate = template.gate.copy()
        gate.aside = waits_for_the_end(self.session.configuration, task)
        copy = self._next_instance(template.task, gate, self.new_id())
        for leaf in task.leaves:
            # What the template has may have been fired again since.
            known = self._known(leaf) if leaf.key in template.received else None
            if known is not None:
                copy.received[leaf.key] = known.kwargs
        copy.cascade = self._applying.depth if self._applying is not None else 0
        self._receive(task, copy, firing, every=True)
        self._wait(task, copy)
        return copy

    def _count(self, firing: FiringRecord) -> None:
        """Remember a firing as its trigger's latest, and as that of each filter it passes."""
        trigger = firing.trigger
        filters = self.session.configuration.filters(trigger)
        known = self.session.latest_of(trigger)
        matched = known.matches if known else {}
        if self.session.head.gates:
            # Gates may have brought filters of their own.
            filters = sorted({*filters, *matched})
        latest = self.session.latest[trigger] = Latest(
            known.count + 1 if known else 1,
            firing.kwargs,
            {where: matched[where] for where in filters if where in matched},
        )
        for where in filters:
            if passes(firing, where):
                latest.count_match(where, firing.kwargs)
        self.fired.add(trigger)

    def _reached(self, task: TaskConfig, firing: FiringRecord) -> list[Instance]:
        """Give the firing to the instances of a task that it concerns."""
        trigger = firing.trigger
        if not self.session.counts_of(task.name).total:
            return [self._create(task, firing)]
        reached = self.session.waiting_for(trigger, task)
        takers = [
            instance for instance in reached
            if task.every is None or task.every.key not in instance.received
        ]
        # Each payload of an andEvery reaches exactly one instance.
        taker = takers[0] if takers and trigger == task.and_every else None
        for instance in reached:
            self._give(task, instance, firing, every=instance is taker)
        if trigger == task.and_every and taker is None:
            reached.append(self._create(task, firing))
        return reached

    def _give(
        self, task: TaskConfig, instance: Instance, firing: FiringRecord, *, every: bool
    ) -> None:
        """Give a firing to the leaves of a waiting instance.

        Args:
            every: Whether it is the ``andEvery`` of this instance.
        """
        before = instance.waits_for(task)
        if self._receive(task, instance, firing, every=every):
            self.touch(instance)
            for trigger in before - instance.waits_for(task):
                self._remove_wait(trigger, instance)

    def _create(self, task: TaskConfig, firing: FiringRecord | None) -> Instance:
        """Make the next instance of a task: past firings first, then this one."""
        instance = self._next_instance(task.name)
        instance.cascade = self._applying.depth if self._applying is not None else 0
        self._receive_past(task, instance, but=firing.trigger if firing else None)
        if firing is not None:
            self._receive(task, instance, firing, every=True)
        self._wait(task, instance)
        return instance

    def _wait(self, task: TaskConfig, instance: Instance) -> None:
        """Note what a waiting instance waits for, and until when."""
        self._set_waits(instance, instance.waits_for(task))
        due = instance.next_look(task, self.now, self.limits.gate_refresh)
        if due:
            self.dues[instance.name] = due

    def _receive(
        self, task: TaskConfig, instance: Instance, firing: FiringRecord, *, every: bool
    ) -> bool:
        """Let an instance's leaves take a firing; tell whether one has."""
        taken = [
            leaf.key for leaf in task.leaves_on(firing.trigger)
            if (leaf != task.every or every)
            and passes(firing, leaf.where)
            and instance.receive(leaf, firing.kwargs)
        ]
        self._receive_counted(task, instance, {firing.trigger}, taken)
        return bool(taken)

    def _receive_past(
        self, task: TaskConfig, instance: Instance, but: str | None = None
    ) -> None:
        """Let an instance's leaves take the latest firings of triggers."""
        past = task.triggers - {task.and_every, but}
        taken = []
        for leaf in task.leaves:
            if leaf.trigger in past and leaf.times is None:
                known = self._known(leaf)
                if known is not None and instance.receive(leaf, known.kwargs):
                    taken.append(leaf.key)
        self._receive_counted(task, instance, past, taken)

    def _receive_counted(
        self, task: TaskConfig, instance: Instance, triggers: Container[str], taken: list[str]
    ) -> None:
        """Let leaves that count take the latest firing if there have been enough.

        They look when their trigger is fired and when it is told how many they want.

        Args:
            triggers: What was fired.
            taken: The keys of the leaves that took something; those that do so here are added.
        """
        waiting = [leaf for leaf in task.counters if leaf.key not in instance.received]
        # Once more for each: what one takes may tell another how many it wants.
        for leaf in waiting * len(waiting):
            told = isinstance(leaf.times, Kwarg) and leaf.times.key in taken
            wanted = leaf.wanted_times(instance.received)
            if wanted is None or not (told or leaf.trigger in triggers):
                continue
            known = self._known(leaf) or Latest(0, {})
            before = instance.gate.since.get(leaf.key, 0) if instance.gate is not None else 0
            if known.count - before >= wanted and instance.receive(leaf, known.kwargs):
                taken.append(leaf.key)

    def _known(self, leaf: On) -> Latest | None:
        """Return what is known of the firings that a leaf would take."""
        latest = self.session.latest_of(leaf.trigger)
        return latest.of(leaf.where) if latest is not None else None

    def _judge(self, task: TaskConfig, instance: Instance) -> None:
        """Decide about a waiting instance: ``unless`` comes before ``after``."""
        if instance.status is not Status.UNSTARTED:
            return
        if 0 < instance.deadline(task) <= self.now:
            self._expire(task, instance)
        elif self.session.head.cancelled is not None:
            self._abandon(task, instance, f'cancelled: {self.session.head.cancelled}')
        elif task.unless.holds(instance.received):
            leaves = dict.fromkeys(task.unless.leaves())
            held = ', '.join(leaf.key for leaf in leaves if leaf.key in instance.received)
            self._abandon(task, instance, f'unless: {held}')
        elif instance.gate is not None and instance.gate.template:
            return
        elif task.wanted.holds(instance.received):
            self._release(task, instance)

    def _release(self, task: TaskConfig, instance: Instance) -> None:
        self._advance(instance, Event.RELEASE)
        # A gate has the id that whoever waits for its result knows.
        instance.task_id = instance.task_id or self.new_id()
        self._delay(task, instance)
        self.released.append(instance.name)
        if self._applying is not None:
            self._applying.released.append(instance.name)
            instance.cascade = self._applying.depth
        self._schedule(instance)

    def _delay(self, task: TaskConfig, instance: Instance) -> None:
        """Put off a released instance whose signature has a countdown or an ETA."""
        gate = instance.gate
        delay, eta = (gate.delay, gate.eta) if gate is not None else (task.delay, 0)
        eta = max(instance.eta, eta, self.now + delay if delay else 0)
        instance.eta = eta if eta > self.now else instance.eta

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
        self._tell_end(task, instance)
        self._fire_abandoned(task, instance, reason)

    def _expire(self, task: TaskConfig | None, instance: Instance) -> None:
        self._advance(instance, Event.EXPIRE)
        instance.metadata['reason'] = 'deadline'
        self._tell_end(task, instance)
        self._fire_abandoned(task, instance, 'deadline', 'expired')

    def _tell_end(self, task: TaskConfig | None, instance: Instance) -> None:
        """Have the result of a gate ended that will not run."""
        if instance.gate is not None:
            if task is not None:
                instance.metadata['missing'] = instance.missing(task)
            self._end_gate(instance, self.now + self.limits.dispatch_grace)

    def _fire_abandoned(
        self, task: TaskConfig | None, instance: Instance, reason: str, outcome: str = 'abandoned'
    ) -> None:
        self.abandoned.append(instance.name)
        missing = instance.missing(task) if task else []
        details = {'reason': reason, 'missing': missing, 'received': sorted(instance.received)}
        self._fire_outcome(instance, outcome, details)

    def _fire_outcome(self, instance: Instance, outcome: str, details: dict[str, Any]) -> None:
        self._fire_end(
            instance,
            outcome_trigger(instance.task, outcome),
            {'instance': instance.name, **details},
        )


def passes(firing: FiringRecord, where: str | None) -> bool:
    """Tell whether a firing passes a filter, which is asked once."""
    if where is None:
        return True
    if where not in firing.passes:
        firing.passes[where] = matches(where, firing.trigger, firing.kwargs)
    return firing.passes[where]
