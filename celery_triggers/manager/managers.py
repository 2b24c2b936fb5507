"""Trigger managers: the controllers of one session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.explain import Explanation, explain
from celery_triggers.engine.session_acts import cancel, reconfigure, start
from celery_triggers.engine.step import Step
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import InvalidConfiguration, UnknownKey
from celery_triggers.manager import by_hand, pending
from celery_triggers.manager.by_hand import no_task
from celery_triggers.manager.checks import milliseconds
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.firing import Firing
from celery_triggers.manager.follow_up import make_change
from celery_triggers.manager.release import Release
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
class TriggerManager(Controller):
    """Fires triggers into a session and looks after its instances.

    Args:
        storage: The session's storage backend.
    """

    def fire(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        connection: Any = None,
    ) -> Firing:
        """Fire a trigger: apply it whole, then send what it released.

        Args:
            trigger_name: Any non-empty string but the name of an outcome.
            trigger_kwargs: A mapping that ``triggers_serializer`` can take.
            event_id: The application's id for this event; the same id in the same
                session is applied once, and a repeat answers what the first one did.
            countdown: In how many seconds it is to be applied. It is accepted now, which
                takes the event id, and stored until then; see :meth:`.Firing.cancel`.
            eta: The same as an aware datetime.
            connection: A ``Connection`` or ``Session`` of SQLAlchemy's to the database of the
                storage ``sql``: the firing becomes part of its transaction, and is applied
                once that is committed. With the storage ``django``, a firing inside
                ``transaction.atomic()`` is so without being asked.

        Returns:
            What came of it; within a transaction that is still to come (``pending``).

        Raises:
            InvalidFiring: The input was refused; nothing changed.
            EventConflict: The event id stands for another trigger or other kwargs. Within a
                transaction that is found out after its commit, and logged.
            StorageUnavailable: The storage did not answer; repeating the call with the
                error's ``event_id`` is safe.
        """
        return pending.ready(self,
            trigger_name, trigger_kwargs, event_id=event_id, countdown=countdown, eta=eta,
            connection=connection,
        ).make()

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
                raise no_task(self, step.session.configuration, *sorted(unknown))
            start(step, deadlines)

        make_change(self, plans.whole if deadlines else plans.head_alone, decide)

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

        make_change(self, plans.whole, decide)
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
                raise no_task(self, step.session.configuration, *sorted(unknown))
            reconfigure(step, step.session.configuration.without(unwanted), apply_past=False)

        make_change(self, plans.whole, decide)

    def cancel(self, reason: str | None = None) -> None:
        """Abandon what waits, now and for as long as the session lives."""
        make_change(self, plans.whole, lambda step: cancel(step, reason or 'by hand'))

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
            raise no_task(self, names, task)
        return [
            explanation
            for name in names
            if task in (None, name)
            for explanation in explain(
                session.configuration.get(name), session.instances_of(name)
            )
        ]

    def cancel_firing(self, event_id: str) -> bool:
        """Take back a delayed firing; tell whether it had not been applied yet.

        Its event id stays taken: a repeat does nothing.

        Raises:
            StorageUnavailable: The storage did not answer; calling again is safe.
        """
        return pending.cancel_firing(self, event_id)

    # --------------------------------------------------------- instances, by hand

    def replay_failed_instance(
        self,
        failed_instance: TaskInstance | str,
        replacement_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> TaskInstance:
        """Run a failed or revoked instance again, as a new instance.

        Args:
            failed_instance: The instance or its name.
            replacement_kwargs: ``{trigger: kwargs}`` that take the place of what was
                fired; other triggers' kwargs stay.

        Returns:
            The new instance.

        Raises:
            InvalidTransition: It is neither failed nor revoked.
            InvalidFiring: The kwargs cannot be serialized, or are of a trigger that the
                task knows nothing of; nothing changed.
        """
        return by_hand.replay(self, failed_instance, replacement_kwargs)

    def resend_scheduled_instance(self, task_instance: TaskInstance | str) -> None:
        """Send the message of a scheduled instance again, now: its queue was purged, say.

        The sweep does so by itself after ``triggers_redeliver_after``. A task that derives
        from :class:`.TriggerTask` runs once, however many messages there are; others run
        with each.

        Args:
            task_instance: The instance or its name.

        Raises:
            InvalidTransition: It is not scheduled.
        """
        by_hand.resend(self, task_instance)

    def skip_failed_instance(
        self,
        failed_instance: TaskInstance | str,
        cascade: bool = False,
        result: Any = None,
    ) -> None:
        """Resolve a failed or revoked instance without running it again.

        Args:
            failed_instance: The instance or its name.
            cascade: Whether its task's name is fired as if it had finished.
            result: The simulated result, used with ``cascade``; ``None`` stands for the
                result of an instance at which a loop was stopped after it had returned.

        Raises:
            InvalidTransition: It is neither failed nor revoked.
            InvalidFiring: The result cannot be serialized; nothing changed.
        """
        by_hand.skip(self, failed_instance, cascade, result)

    def update_instance_status(
        self,
        task_instance: TaskInstance | str,
        status: Status | str,
        metadata: Mapping[str, Any] | None = None,
        cascade: bool = False,
        cascade_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Set an instance's status by hand.

        Any resolved status can be set on an unresolved instance, ``failed`` and
        ``revoked`` on what was released.

        Args:
            metadata: Joins the instance's metadata.
            cascade: Whether its task's name is fired, with ``cascade_kwargs``.

        Raises:
            InvalidTransition: The instance cannot get that status.
        """
        by_hand.set_status(self, task_instance, status, metadata, cascade, cascade_kwargs)

    def update_instance_metadata(
        self, task_instance: TaskInstance | str, metadata: Mapping[str, Any]
    ) -> None:
        """Merge facts into an instance's metadata.

        Raises:
            InvalidFiring: They are no mapping or cannot be serialized.
        """
        by_hand.add_metadata(self, task_instance, metadata)

    def mark_instance_logs_resolved(self, task_instance: TaskInstance | str) -> None:
        """Note that somebody has seen to the warnings that an instance logged."""
        by_hand.resolve_logs(self, task_instance)

    def create_instance(self, task: TaskConfig | str) -> TaskInstance:
        """Make the next instance of a trigger task by hand.

        It receives the latest firings that its condition names, but for ``andEvery``. If
        its condition holds it is released at once, if ``unless`` holds it is abandoned.

        Raises:
            InvalidConfiguration: The session has no such trigger task; nothing changed.
        """
        return by_hand.create(self, task)

    def clone_instance(self, instance: TaskInstance | str) -> TaskInstance:
        """Make another instance with what this one received; this one stays as it is.

        If its condition holds it is released at once, if ``unless`` holds it is abandoned.

        Raises:
            UnknownInstance: There is no such instance.
            InvalidConfiguration: The session no longer has its trigger task.
        """
        return by_hand.clone(self, instance)


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
