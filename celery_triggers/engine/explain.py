"""Why a trigger task has run or has not."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime, timezone

from celery_triggers.engine.conditions import AllOf, AnyOf, AtLeast, Condition
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a trigger task has run or has not.

    Attributes:
        instance: The instance's name, or ``None`` where the task has none.
        missing: Triggers of its condition that it has not received.
        received: Triggers that it has received.
        text: The same in a sentence.
    """

    task: str
    instance: str | None
    status: str | None
    missing: list[str]
    received: list[str]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(config: TaskConfig | None, instances: list[Instance]) -> list[Explanation]:
    """Say of each instance of a trigger task why it stands where it does.

    Args:
        config: ``None`` for gates, which bring their own.
    """
    if not instances and config is not None:
        missing = list(config.wanted)
        text = (
            f'{config.name} has no instance: no firing has reached it; '
            f'it waits for {_wanting(config.wanted, ())}'
        )
        if len(config.unless):
            text += f', unless {_wanting(config.unless, ())}'
        return [Explanation(config.name, None, None, missing, [], text)]
    heirs = {str(i.metadata['parent']): i.name for i in instances if 'parent' in i.metadata}
    return [
        _explain_instance(own, instance, heirs.get(instance.name))
        for instance in instances
        if (own := instance.gate.config(instance.task) if instance.gate else config) is not None
    ]


def _explain_instance(config: TaskConfig, instance: Instance, heir: str | None) -> Explanation:
    missing = instance.missing(config) if instance.status is Status.UNSTARTED else []
    why = _why(config, instance, heir)
    text = f'{instance.name} is {instance.status}{why}'
    received = sorted(instance.received)
    return Explanation(
        config.name, instance.name, instance.status.value, missing, received, text
    )


def _why(config: TaskConfig, instance: Instance, heir: str | None) -> str:
    match instance.status:
        case Status.UNSTARTED:
            received = ', '.join(sorted(instance.received)) or 'nothing'
            deadline = instance.deadline(config)
            if instance.gate is not None and instance.gate.template:
                return f': each firing of {config.and_every} makes a copy of it'
            return (
                f': it has {received} and waits for {_wanting(config.wanted, instance.received)}'
                + (f', until {_at(deadline)}' if deadline else '')
            )
        case Status.SCHEDULED:
            eta = f', not before {_at(instance.eta)}' if instance.eta else ''
            return (
                f': no worker has claimed attempt {instance.attempt} of task '
                f'{instance.task_id}{eta}'
            )
        case Status.RUNNING:
            return f': a worker has claimed attempt {instance.attempt} of task {instance.task_id}'
        case Status.REPLAYED:
            return f': {heir} took its place' if heir else ''
        case Status.FINISHED | Status.SKIPPED:
            return ''
    reason = instance.metadata.get('reason')
    exception = instance.metadata.get('exception') or {}
    facts = [exception.get('type'), exception.get('message')]
    if instance.status is not Status.FAILED:
        facts = []
    return (f' ({reason})' if reason else '') + ''.join(f': {fact}' for fact in facts if fact)


def _at(milliseconds: int) -> str:
    time = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    return f'{time:%Y-%m-%d %H:%M:%S} UTC'


def _wanting(condition: Condition, received: Container[str]) -> str:
    """Say what a condition that does not hold still wants."""
    if not isinstance(condition, (AllOf, AnyOf, AtLeast)):
        return str(condition)
    members = [member for member in condition.members if not member.holds(received)]
    texts = [_wanting(member, received) for member in members]
    if isinstance(condition, AllOf):
        return ' and '.join(texts) if any(' of ' in text for text in texts) else ', '.join(texts)
    if isinstance(condition, AtLeast):
        number = condition.count - (len(condition.members) - len(members))
        return f'{number} of ({", ".join(texts)})'
    return f'one of ({", ".join(texts)})'
