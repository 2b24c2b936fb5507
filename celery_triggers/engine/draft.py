"""A session being changed: its records, counters, index and due dates, kept in step.

Every change of an instance goes through here, so that the counters and the index of
waiting instances always equal a recount.
"""

from __future__ import annotations

from collections.abc import Callable

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import ENDING, Instance
from celery_triggers.engine.limits import Limits
from celery_triggers.engine.session import EventRecord, FiringRecord, Session
from celery_triggers.engine.transitions import RESOLVED, WITH_DUE_DATE, Event, Status

__all__ = ['Draft']


class Draft:
    """The changes that a step makes to a slice, and the note of what they touched.

    Args:
        session: The slice; it is changed in place.
        now: The storage's time in milliseconds; it never goes back.
        new_id: Makes the task id of a released instance.
        limits: What the settings allow.

    Attributes:
        changed: Whether there is anything to commit.
        created: The names of new instances, in their order.
        touched: The instances to be written, by name.
        counted: The tasks whose counts are to be written.
        waits_added, waits_removed: Changes of the index, ``(trigger, instance)``.
        new_configuration: What the session is to have from now on, if that changes.
        dues: Due dates to be set, by instance; 0: it has none any more.
        delayed: The event ids of delayed firings that came or went.
        gates: Which gate waits under a task id from now on, ``''``: none does any more.
        to_end: The names of gates whose end is to be told, after the commit.
        to_send: The names of instances whose messages are to be sent after the commit.
        released, abandoned: The names of instances, in the order in which it happened.
        replayed: The names of instances that took the place of others.
        skipped: The names of instances that were skipped, and whether they cascaded.
        records: The firings that were applied, for the history.
        fired: The triggers whose latest kwargs are to be written.
        stopped: Which loops went on for too long, in a sentence each.
        events: What the step did, under the ids that stand for it.
        applying: The firing that is being applied just now.
    """

    def __init__(self, session: Session, now: int, new_id: Callable[[], str], limits: Limits):
        self.session = session
        self.now = max(now, session.head.clock)
        self.new_id = new_id
        self.limits = limits
        self.changed = False
        self.created: list[str] = []
        self.touched: dict[str, Instance] = {}
        self.counted: set[str] = set()
        self.waits_added: set[tuple[str, str]] = set()
        self.waits_removed: set[tuple[str, str]] = set()
        self.new_configuration: Configuration | None = None
        self.dues: dict[str, int] = {}
        self.delayed: set[str] = set()
        self.gates: dict[str, str] = {}
        self.to_end: list[str] = []
        self.to_send: list[str] = []
        self.released: list[str] = []
        self.abandoned: list[str] = []
        self.replayed: list[str] = []
        self.skipped: list[tuple[str, bool]] = []
        self.records: list[FiringRecord] = []
        self.fired: set[str] = set()
        self.stopped: list[str] = []
        self.events: dict[str, EventRecord] = {}
        self.applying: FiringRecord | None = None

    def touch(self, instance: Instance) -> None:
        """Note that an instance is to be written."""
        self.touched[instance.name] = instance
        self.changed = True

    def advance(self, instance: Instance, event: Event) -> None:
        before = instance.status
        instance.follow(event, self.now)
        self.recount(instance, before)

    def recount(self, instance: Instance, before: Status) -> None:
        waited = before is Status.UNSTARTED
        resolved = before not in RESOLVED and instance.is_resolved
        if instance.gate is None:
            counts = self.session.counts_of(instance.task)
            counts.unstarted -= waited
            counts.unresolved -= resolved
            self.counted.add(instance.task)
        self.session.head.unresolved -= resolved
        had_date = before in WITH_DUE_DATE
        if waited:
            self._drop_waits(instance)
            task = self.session.config_of(instance)
            had_date = bool(instance.until) or (task is not None and task.within is not None)
            if instance.gate is not None:
                had_date = True
                self._forget_gate(instance, instance.gate)
        if instance.is_ending and instance.status is Status.REPLAYED:
            # Before anybody was told: what takes its place has the same result.
            instance.loss, had_date = '', True
        if had_date and instance.status not in WITH_DUE_DATE:
            self.dues[instance.name] = 0
        self.touch(instance)

    def set_waits(self, instance: Instance, wanted: set[str]) -> None:
        """Bring the index of a waiting instance, which must be loaded, up to ``wanted``."""
        name, waiting = instance.name, self.session.waiting
        for trigger in [t for t, names in waiting.items() if name in names]:
            if trigger not in wanted:
                self.remove_wait(trigger, instance)
        for trigger in wanted:
            names = waiting.setdefault(trigger, set())
            if name not in names:
                names.add(name)
                self._note_wait((trigger, name), self.waits_added, self.waits_removed)

    def remove_wait(self, trigger: str, instance: Instance) -> None:
        self.session.waiting.get(trigger, set()).discard(instance.name)
        self._note_wait((trigger, instance.name), self.waits_removed, self.waits_added)

    def _drop_waits(self, instance: Instance) -> None:
        """Take an instance that no longer waits out of the index."""
        task = self.session.config_of(instance)
        for trigger in task.triggers_beside(instance.received) if task else ():
            self.remove_wait(trigger, instance)

    @staticmethod
    def _note_wait(
        wait: tuple[str, str], into: set[tuple[str, str]], out_of: set[tuple[str, str]]
    ) -> None:
        if wait in out_of:
            out_of.discard(wait)
        else:
            into.add(wait)

    def next_instance(
        self, task: str, gate: Gate | None = None, task_id: str = ''
    ) -> Instance:
        counts = self.session.counts_of(task)
        instance = Instance(task, counts.total, task_id=task_id, changed=self.now, gate=gate)
        counts.total += 1
        if gate is None:
            counts.unresolved += 1
            counts.unstarted += 1
        else:
            # Gates are counted in the head: which ones a firing reaches is known too late.
            self.session.head.gates += 1
            self.session.head.aside += gate.aside
            self.gates[task_id] = instance.name
        self.session.head.unresolved += 1
        self.session.instances[instance.name] = instance
        self.counted.add(task)
        self.created.append(instance.name)
        self.touch(instance)
        return instance

    def _forget_gate(self, instance: Instance, gate: Gate) -> None:
        """Note that a gate waits no longer."""
        self.session.head.gates -= 1
        self.session.head.aside -= gate.aside
        self.gates[instance.task_id] = ''

    def clone(self, instance: Instance) -> Instance:
        """Make a new unstarted instance with the kwargs of this one, a level deeper.

        That of a gate has the same task id, which whoever waits for its result knows.
        """
        task_id = instance.task_id if instance.gate is not None else ''
        new = self.next_instance(instance.task, instance.gate, task_id)
        new.received = dict(instance.received)
        new.cascade = instance.cascade
        new.depth = instance.depth + 1
        new.metadata['parent'] = instance.name
        return new

    def end_gate(self, instance: Instance, due: int, *, at_once: bool = True) -> None:
        """Have everybody told who waits for the result of a gate.

        Args:
            due: When it should have been done.
            at_once: Whether the message is sent now, and not by the sweep.
        """
        if instance.gate is not None:
            instance.loss = ENDING
            instance.token, instance.lease, instance.sends = '', 0, 0
            self.dues[instance.name] = due
            if at_once:
                self.to_end.append(instance.name)

    def unstarted(self) -> list[Instance]:
        found = [i for i in self.session.instances.values() if i.status is Status.UNSTARTED]
        return sorted(found, key=lambda i: (i.task, i.number))

    def schedule(self, instance: Instance, *, send: bool = True) -> None:
        """Give a scheduled instance its due date, and have it sent if it runs soon."""
        soon = self.now + self.limits.dispatch_grace
        if instance.eta > soon:
            self.dues[instance.name] = instance.eta
            return
        # One that has to wait a little is sent with its ETA, and looked at after that.
        self.dues[instance.name] = max(soon, instance.eta + self.limits.dispatch_grace)
        if send:
            self.to_send.append(instance.name)

    def remember(self, event_id: str, record: EventRecord) -> None:
        """Store under an id what came of this step."""
        record.created = list(self.created)
        record.released = list(self.released)
        record.abandoned = list(self.abandoned)
        self.events[event_id] = record
