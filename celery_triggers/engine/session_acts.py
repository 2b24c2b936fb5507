"""Acts on a whole session: start its deadlines, change its configuration, cancel it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.step import Step
from celery_triggers.exceptions import InvalidConfiguration

__all__ = ['cancel', 'reconfigure', 'start']


def start(step: Step, until: Mapping[str, int]) -> None:
    """Let deadlines count from now, if no firing has begun the session.

    Args:
        until: Deadlines of this session's own, in milliseconds, by trigger task: of
            what waits for its release now. The whole session must be loaded for them.
    """
    step.cascade.begin()
    head = step.session.head
    if not head.has_begun:
        head.begun = step.draft.now
        step.draft.changed = True
    for name, deadline in sorted(until.items()):
        task = step.session.configuration[name]
        waiting = [i for i in step.draft.unstarted() if i.task == name]
        if not step.session.counts_of(name).total:
            waiting = [step.reception.create(task, None)]
        for instance in waiting:
            instance.until = deadline
            step.draft.touch(instance)
            step.reception.wait(task, instance)
            step.cascade.judge(task, instance)
    step.cascade.settle()


def reconfigure(
    step: Step, configuration: Configuration, *, apply_past: bool, named: Collection[str] = ()
) -> None:
    """Change the session's configuration and look again at what waits.

    The whole session must be loaded.

    Args:
        apply_past: Whether past firings reach what waits, and the tasks in ``named``
            that have no instance.
    """
    old = step.session.configuration
    for name in sorted({i.task for i in step.session.instances.values() if i.gate}):
        if name in configuration and name not in old:
            raise InvalidConfiguration(
                'a gate of this session has this name; give the trigger task another',
                task=name,
            )
    step.session.configuration = step.draft.new_configuration = configuration
    step.session.head.digest = configuration.digest
    step.draft.changed = True
    step.reception.filter_past({
        trigger: configuration.filters(trigger) for trigger in step.session.latest
    })
    for instance in step.draft.unstarted():
        if instance.gate is not None:
            # It brings its own.
            continue
        task = configuration.get(instance.task)
        if instance.deadline(old.get(instance.task)):
            step.draft.dues[instance.name] = 0
        if task is None:
            step.draft.set_waits(instance, set())
            step.cascade.abandon(old.get(instance.task), instance, 'removed')
            continue
        if apply_past:
            step.reception.receive_past(task, instance)
        step.draft.touch(instance)
        step.reception.wait(task, instance)
        step.cascade.judge(task, instance)
    if apply_past:
        _create_from_past(step, named)
    if step.session.head.has_begun:
        # Those that came with this change count from now.
        step.cascade.create_with_deadline()
    step.cascade.settle()


def _create_from_past(step: Step, names: Collection[str]) -> None:
    """Make the instances that these trigger tasks would have had from past firings."""
    for name in sorted(names):
        task = step.session.configuration[name]
        if step.session.counts_of(name).total:
            continue
        payloads = [r for r in step.session.history if r.trigger == task.and_every]
        for firing in payloads:
            step.cascade.judge(task, step.reception.create(task, firing))
        known = [step.session.latest_of(trigger) for trigger in task.triggers]
        if not payloads and any(latest and latest.count for latest in known):
            step.cascade.judge(task, step.reception.create(task, None))


def cancel(step: Step, reason: str) -> None:
    """Abandon what waits, now and later; the whole session must be loaded."""
    step.session.head.cancelled = reason
    step.draft.changed = True
    for instance in step.draft.unstarted():
        task = step.session.config_of(instance)
        step.cascade.abandon(task, instance, f'cancelled: {reason}')
    step.cascade.settle()
