"""What a person does to instances of a session: end, repeat, mend and make them by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.names import plain
from celery_triggers.engine.step import Step, cascade_kwargs
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import UNHAPPY, Status
from celery_triggers.exceptions import (
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
    UnknownInstance,
)
from celery_triggers.manager.checks import checked_kwargs
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.follow_up import make_change
from celery_triggers.storages.view import TaskInstance

__all__ = [
    'add_metadata', 'clone', 'create', 'no_task', 'replay', 'resend', 'resolve_logs', 'set_status',
    'skip',
]


def replay(
    manager: Controller,
    failed_instance: TaskInstance | str,
    replacement_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
) -> TaskInstance:
    """Run a failed or revoked instance again: :meth:`.TriggerManager.replay_failed_instance`."""
    name = _name(failed_instance)
    kwargs = {
        trigger: checked_kwargs(manager, trigger, value)
        for trigger, value in (replacement_kwargs or {}).items()
    }

    def decide(step: Step) -> None:
        instance = _unhappy(manager, step, name, Status.REPLAYED)
        _check_replacement(manager, step.session.config_of(instance), instance, kwargs)
        step.replay(instance, replacement_kwargs=kwargs)

    outcome = make_change(manager, plans.outcome(name), decide)
    return manager.storage[outcome.record.created[0]]


def resend(manager: Controller, task_instance: TaskInstance | str) -> None:
    """Send a scheduled instance again: :meth:`.TriggerManager.resend_scheduled_instance`."""
    name = _name(task_instance)

    def decide(step: Step) -> None:
        instance = _instance(manager, step, name)
        if instance.status is not Status.SCHEDULED:
            raise InvalidTransition(
                f'{name} of session {manager.uid!r} is {instance.status}; only a scheduled '
                'instance can be sent again',
                instance=name, status=instance.status.value, wanted=Status.SCHEDULED.value,
            )
        step.resend(instance)

    make_change(manager, plans.record_of(name), decide)


def skip(
    manager: Controller,
    failed_instance: TaskInstance | str,
    cascade: bool = False,
    result: Any = None,
) -> None:
    """Resolve a failed or revoked instance: :meth:`.TriggerManager.skip_failed_instance`."""
    name = _name(failed_instance)
    given = checked_kwargs(manager, name, cascade_kwargs(result)) if cascade else None

    def decide(step: Step) -> None:
        instance = _unhappy(manager, step, name, Status.SKIPPED)
        if not cascade:
            step.skip(instance)
            return
        known = instance.metadata.get('result') if result is None else result
        kwargs = given if result is not None else cascade_kwargs(known)
        step.skip(instance, metadata={'result': known}, cascade=kwargs)

    make_change(manager, plans.outcome(name), decide)


def set_status(
    manager: Controller,
    task_instance: TaskInstance | str,
    status: Status | str,
    metadata: Mapping[str, Any] | None = None,
    cascade: bool = False,
    cascade_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Set an instance's status: :meth:`.TriggerManager.update_instance_status`."""
    name, wanted = _name(task_instance), Status(status)
    kwargs = checked_kwargs(manager, name, cascade_kwargs) if cascade else None
    facts = checked_kwargs(manager, name, metadata)

    def decide(step: Step) -> None:
        step.set_status(
            _instance(manager, step, name), wanted, metadata=facts, cascade=kwargs
        )

    make_change(manager, plans.outcome(name), decide)


def add_metadata(
    manager: Controller, task_instance: TaskInstance | str, metadata: Mapping[str, Any]
) -> None:
    """Merge facts into an instance's metadata: :meth:`.TriggerManager.update_instance_metadata`."""
    name = _name(task_instance)
    facts = checked_kwargs(manager, name, metadata)

    def decide(step: Step) -> None:
        instance = _instance(manager, step, name)
        # Together they must still be what the serializer can take.
        instance.metadata = checked_kwargs(manager, name, {**instance.metadata, **facts})
        step.draft.touch(instance)

    make_change(manager, plans.record_of(name), decide)


def resolve_logs(manager: Controller, task_instance: TaskInstance | str) -> None:
    """Note that warnings were seen to: :meth:`.TriggerManager.mark_instance_logs_resolved`."""
    name = _name(task_instance)

    def decide(step: Step) -> None:
        instance = _instance(manager, step, name)
        instance.logs_resolved = True
        step.draft.touch(instance)

    make_change(manager, plans.record_of(name), decide)


def create(manager: Controller, task: TaskConfig | str) -> TaskInstance:
    """Make the next instance of a trigger task: :meth:`.TriggerManager.create_instance`."""
    name = task if isinstance(task, str) else task.name

    def decide(step: Step) -> None:
        step.create(_config(manager, step, name))

    outcome = make_change(manager, plans.whole, decide)
    return manager.storage[outcome.record.created[0]]


def clone(manager: Controller, instance: TaskInstance | str) -> TaskInstance:
    """Make another instance with what this one received: :meth:`.TriggerManager.clone_instance`."""
    name = _name(instance)

    def decide(step: Step) -> None:
        original = _instance(manager, step, name)
        step.copy(_config(manager, step, original.task), original)

    outcome = make_change(manager, plans.whole, decide)
    return manager.storage[outcome.record.created[0]]


def _config(manager: Controller, step: Step, task: str) -> TaskConfig:
    configuration = step.session.configuration
    if task not in configuration:
        raise no_task(manager, configuration, task)
    return configuration[task]


def no_task(manager: Controller, configuration: Iterable[str], *names: str) -> InvalidConfiguration:
    missing = ', '.join(map(repr, names))
    return InvalidConfiguration(
        f'session {manager.uid!r} has no trigger task {missing}; '
        f'it has: {", ".join(configuration) or "none"}'
    )


def _check_replacement(
    manager: Controller, config: TaskConfig | None, instance: Any, kwargs: Mapping[str, Any]
) -> None:
    known = {*instance.received, *(leaf.key for leaf in (config.leaves if config else ()))}
    known.update(config.with_params if config else ())
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise InvalidFiring(
            f'{instance.name} of session {manager.uid!r} has nothing to do with '
            f'{", ".join(unknown)}; its triggers are: {", ".join(sorted(known))}',
            uid=manager.uid, trigger=unknown[0],
        )


def _instance(manager: Controller, step: Step, name: str) -> Any:
    instance = step.session.instance(name)
    if instance is None:
        raise UnknownInstance(manager.uid, name)
    return instance


def _unhappy(manager: Controller, step: Step, name: str, wanted: Status) -> Any:
    instance = _instance(manager, step, name)
    if instance.status not in UNHAPPY:
        raise InvalidTransition(
            f'{name} of session {manager.uid!r} is {instance.status}; only a failed or '
            f'revoked instance can be {wanted} by hand',
            instance=name, status=instance.status.value, wanted=wanted.value,
        )
    return instance


def _name(instance: TaskInstance | str) -> str:
    if isinstance(instance, str):
        return plain(instance)
    if isinstance(instance, TaskInstance):
        return instance.name
    raise TypeError(f'an instance or its name is wanted, such as "t_ship#0", not {instance!r}')
