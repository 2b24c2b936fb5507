"""What instances receive: firings are counted, and taken by the leaves that wait for them."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping

from celery_triggers.engine.conditions import Kwarg, On
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.filters import matches
from celery_triggers.engine.finalizing import waits_for_the_end
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.session import FiringRecord, Latest, NotLoaded, Plan
from celery_triggers.engine.task_config import TaskConfig

__all__ = ['Reception']


class Reception:
    """Hands firings to instances, and makes those that a firing asks for.

    Args:
        draft: What is changed.
    """

    def __init__(self, draft: Draft):
        self._draft = draft

    def count(self, firing: FiringRecord) -> None:
        """Remember a firing as its trigger's latest, and as that of each filter it passes."""
        trigger = firing.trigger
        filters = self._draft.session.configuration.filters(trigger)
        known = self._draft.session.latest_of(trigger)
        matched = known.matches if known else {}
        if self._draft.session.head.gates:
            # Gates may have brought filters of their own.
            filters = sorted({*filters, *matched})
        latest = self._draft.session.latest[trigger] = Latest(
            known.count + 1 if known else 1,
            firing.kwargs,
            {where: matched[where] for where in filters if where in matched},
        )
        for where in filters:
            if passes(firing, where):
                latest.count_match(where, firing.kwargs)
        self._draft.fired.add(trigger)

    def reached(self, task: TaskConfig, firing: FiringRecord) -> list[Instance]:
        """Give the firing to the instances of a task that it concerns."""
        trigger = firing.trigger
        if not self._draft.session.counts_of(task.name).total:
            return [self.create(task, firing)]
        reached = self._draft.session.waiting_for(trigger, task)
        takers = [
            instance for instance in reached
            if task.every is None or task.every.key not in instance.received
        ]
        # Each payload of an andEvery reaches exactly one instance.
        taker = takers[0] if takers and trigger == task.and_every else None
        for instance in reached:
            self.give(task, instance, firing, every=instance is taker)
        if trigger == task.and_every and taker is None:
            reached.append(self.create(task, firing))
        return reached

    def give(
        self, task: TaskConfig, instance: Instance, firing: FiringRecord, *, every: bool
    ) -> None:
        """Give a firing to the leaves of a waiting instance.

        Args:
            every: Whether it is the ``andEvery`` of this instance.
        """
        before = instance.waits_for(task)
        if self._receive(task, instance, firing, every=every):
            self._draft.touch(instance)
            for trigger in before - instance.waits_for(task):
                self._draft.remove_wait(trigger, instance)

    def create(self, task: TaskConfig, firing: FiringRecord | None) -> Instance:
        """Make the next instance of a task: past firings first, then this one."""
        instance = self._draft.next_instance(task.name)
        instance.cascade = self._draft.applying.depth if self._draft.applying is not None else 0
        self.receive_past(task, instance, but=firing.trigger if firing else None)
        if firing is not None:
            self._receive(task, instance, firing, every=True)
        self.wait(task, instance)
        return instance

    def copy_of(self, task: TaskConfig, template: Instance, firing: FiringRecord) -> Instance:
        """Make the instance that a firing of a gate's ``andEvery`` asks for."""
        assert template.gate is not None
        gate = template.gate.copy()
        gate.aside = waits_for_the_end(self._draft.session.configuration, task)
        copy = self._draft.next_instance(template.task, gate, self._draft.new_id())
        for leaf in task.leaves:
            # What the template has may have been fired again since.
            known = self.known(leaf) if leaf.key in template.received else None
            if known is not None:
                copy.received[leaf.key] = known.kwargs
        copy.cascade = self._draft.applying.depth if self._draft.applying is not None else 0
        self._receive(task, copy, firing, every=True)
        self.wait(task, copy)
        return copy

    def wait(self, task: TaskConfig, instance: Instance) -> None:
        """Note what a waiting instance waits for, and until when."""
        self._draft.set_waits(instance, instance.waits_for(task))
        due = instance.next_look(task, self._draft.now, self._draft.limits.gate_refresh)
        if due:
            self._draft.dues[instance.name] = due

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

    def receive_past(
        self, task: TaskConfig, instance: Instance, but: str | None = None
    ) -> None:
        """Let an instance's leaves take the latest firings of triggers."""
        past = task.triggers - {task.and_every, but}
        taken = []
        for leaf in task.leaves:
            if leaf.trigger in past and leaf.times is None:
                known = self.known(leaf)
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
            known = self.known(leaf) or Latest(0, {})
            before = instance.gate.since.get(leaf.key, 0) if instance.gate is not None else 0
            if known.count - before >= wanted and instance.receive(leaf, known.kwargs):
                taken.append(leaf.key)

    def known(self, leaf: On) -> Latest | None:
        """Return what is known of the firings that a leaf would take."""
        latest = self._draft.session.latest_of(leaf.trigger)
        return latest.of(leaf.where) if latest is not None else None

    def filter_past(self, filters: Mapping[str, Collection[str]]) -> None:
        """Ask filters that are new about the firings that the history holds.

        Args:
            filters: By trigger.
        """
        new: dict[str, list[str]] = {}
        for trigger in sorted(filters):
            latest = self._draft.session.latest.get(trigger)
            known = latest.matches if latest is not None else {}
            new[trigger] = sorted(set(filters[trigger]).difference(known))
            if new[trigger]:
                if not self._draft.session.plan.whole:
                    raise NotLoaded(Plan(whole=True))
                latest = self._draft.session.latest.setdefault(trigger, Latest(0, {}))
                latest.matches.update((where, Latest(0, {})) for where in new[trigger])
                self._draft.fired.add(trigger)
        for firing in self._draft.session.history:
            for where in new.get(firing.trigger, ()):
                if passes(firing, where):
                    self._draft.session.latest[firing.trigger].count_match(where, firing.kwargs)


def passes(firing: FiringRecord, where: str | None) -> bool:
    """Tell whether a firing passes a filter, which is asked once."""
    if where is None:
        return True
    if where not in firing.passes:
        firing.passes[where] = matches(where, firing.trigger, firing.kwargs)
    return firing.passes[where]
