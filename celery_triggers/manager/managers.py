"""Trigger managers: the controllers of one session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.configuring import cancel, reconfigure, start
from celery_triggers.engine.explain import Explanation, explain
from celery_triggers.engine.step import Step
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.exceptions import InvalidConfiguration, UnknownKey
from celery_triggers.manager.controller import Release
from celery_triggers.manager.firing import Firing
from celery_triggers.manager.firings import Firings, milliseconds
from celery_triggers.registry import task_runners, trigger_managers
from celery_triggers.storages.view import TaskInstance

__all__ = [
    'Explanation',
    'FinalizingTriggerManager',
    'Firing',
    'Release',
    'TriggerManager',
    'trigger_managers',
]


@trigger_managers.register('default')
class TriggerManager(Firings):
    """Fires triggers into a session and looks after its instances.

    Args:
        storage: The session's storage backend.
    """

    def start(self, until: Mapping[str, datetime] | None = None) -> None:
        """Begin the session: it exists, and its deadlines count from now. Nothing is fired.

        A session that has begun goes on as it was.

        Args:
            until: Deadlines of this session's own, ``{trigger task: aware datetime}``, of
                what has not been released; also for trigger tasks that have no ``within``.

        Raises:
            InvalidConfiguration: The session has no such trigger task.
            TypeError: A deadline is no aware datetime.
        """
        deadlines = {name: _deadline(name, at) for name, at in (until or {}).items()}

        def decide(step: Step) -> None:
            unknown = set(deadlines).difference(step.session.configuration)
            if unknown:
                raise self._no_task(step.session.configuration, *sorted(unknown))
            start(step, deadlines)

        self.change(plans.whole if deadlines else plans.head_alone, decide)

    # ----------------------------------------------------------- configuration

    def update_configuration(
        self, configuration: Mapping[str, Any], apply_past: bool = False
    ) -> None:
        """Add or replace trigger tasks of this session alone.

        Args:
            configuration: ``{name: directives}``.
            apply_past: Whether firings that were applied before reach new trigger tasks
                and waiting instances.

        Raises:
            InvalidConfiguration: It was refused whole; nothing changed.
        """
        changes = Configuration.parse(configuration)
        check_runners(changes)

        def decide(step: Step) -> None:
            updated = step.session.configuration.updated(changes)
            reconfigure(step, updated, apply_past=apply_past, named=changes)

        self.change(plans.whole, decide)
        changes.warn_about_cycles()

    def remove_tasks(self, names: Iterable[str]) -> None:
        """Take trigger tasks out of this session; their waiting instances are abandoned.

        Raises:
            InvalidConfiguration: The session has no such trigger task; nothing changed.
        """
        unwanted = {names} if isinstance(names, str) else set(names)

        def decide(step: Step) -> None:
            unknown = unwanted - set(step.session.configuration)
            if unknown:
                raise self._no_task(step.session.configuration, *sorted(unknown))
            reconfigure(step, step.session.configuration.without(unwanted), apply_past=False)

        self.change(plans.whole, decide)

    def cancel(self, reason: str | None = None) -> None:
        """Abandon what waits, now and for as long as the session lives."""
        self.change(plans.whole, lambda step: cancel(step, reason or 'by hand'))

    # ------------------------------------------------------------------ asking

    def get_unresolved_tasks(self) -> list[TaskConfig]:
        """Return the trigger tasks that have no instance, or an unresolved one."""
        return self.storage.get_unresolved_tasks()

    def get_unresolved_instances(self) -> list[TaskInstance]:
        """Return the instances that are not resolved."""
        return self.storage.get_unresolved_instances()

    def explain(self, task: str | None = None) -> list[Explanation]:
        """Say of each instance, or of those of one trigger task, why it stands where it does.

        Args:
            task: The name of a trigger task or of a gate.

        Raises:
            InvalidConfiguration: The session has no trigger task of that name, and no gate.
        """
        session = self.storage.load()
        gates = {i.task for i in session.instances.values() if i.gate is not None}
        names = sorted({*session.configuration, *gates})
        if task is not None and task not in names:
            raise self._no_task(names, task)
        return [
            explanation
            for name in names
            if task in (None, name)
            for explanation in explain(
                session.configuration.get(name), session.instances_of(name)
            )
        ]


@trigger_managers.register('finalizing')
class FinalizingTriggerManager(TriggerManager):
    """Fires ``sessionFinalized`` once, when nothing that counts is unresolved."""

    finalizing = True


def _deadline(task: str, at: Any) -> int:
    deadline = milliseconds(at)
    if deadline is None:
        raise TypeError(
            f'the deadline of {task!r} is an aware datetime, such as '
            f'datetime.now(timezone.utc) + timedelta(hours=1), not {at!r}'
        )
    return deadline


def check_runners(configuration: Configuration) -> None:
    """Refuse a configuration that names a task runner which is not registered."""
    for task in configuration.values():
        if task.using is not None and task.using not in task_runners:
            raise InvalidConfiguration(
                str(UnknownKey('task runner', task.using, task_runners.known())),
                task=task.name,
                directive='using',
            )
