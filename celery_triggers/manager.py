"""Trigger managers: the controllers of one session."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from kombu.exceptions import EncodeError

from celery_triggers.controller import Controller, Release
from celery_triggers.engine import plans
from celery_triggers.engine.configuration import Configuration, TaskConfig
from celery_triggers.engine.explain import Explanation, explain
from celery_triggers.engine.names import SESSION_FINALIZED, check_trigger, problem_with
from celery_triggers.engine.step import Step, cascade_kwargs
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
    UnheardTrigger,
    UnknownInstance,
    UnknownKey,
)
from celery_triggers.firing import Firing, ReadyFiring
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

logger = logging.getLogger(__name__)

T = TypeVar('T')


@trigger_managers.register('default')
class TriggerManager(Controller):
    """Fires triggers into a session and looks after its instances.

    Args:
        storage: The session's storage backend.
    """

    # ------------------------------------------------------------------ firing

    def fire(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
    ) -> Firing:
        """Fire a trigger: apply it whole, then send what it released.

        Args:
            trigger_name: Any non-empty string but the name of an outcome.
            trigger_kwargs: A mapping that ``triggers_serializer`` can take.
            event_id: The application's id for this event; the same id in the same
                session is applied once, and a repeat answers what the first one did.

        Raises:
            InvalidFiring: The input was refused; nothing changed.
            EventConflict: The event id stands for another trigger or other kwargs.
            StorageUnavailable: The storage did not answer; repeating the call with the
                error's ``event_id`` is safe.
        """
        return self.ready(trigger_name, trigger_kwargs, event_id=event_id).make()

    def ready(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
    ) -> ReadyFiring:
        """Check a firing, with the arguments of :meth:`fire`, and change nothing yet."""
        trigger = check_trigger(self.uid, trigger_name)
        kwargs = self._checked_kwargs(trigger, trigger_kwargs)
        self._check_event_id(trigger, event_id)
        self._check_runner()

        def decide(step: Step) -> None:
            # The session's own manager counts, whichever class this firing came through.
            if trigger == SESSION_FINALIZED and step.finalizing:
                raise InvalidFiring(
                    f'{trigger!r} is fired by the finalizing manager, never by hand',
                    uid=self.uid, trigger=trigger,
                )
            if not step.session.configuration.listeners(trigger):
                self._unheard(step.session.configuration, trigger)
            step.fire(trigger, kwargs, event_id=event_id)

        change = self.prepare(
            plans.firing(trigger), decide, event_id=event_id, identity=(trigger, kwargs)
        )
        return ReadyFiring(self, trigger, kwargs, change)

    def start(self) -> None:
        """Touch the session, so that it exists with its configuration, and fire nothing."""

        def decide(step: Step) -> None:
            step.changed = step.new_configuration is not None

        self.change(plans.head_alone, decide)

    def _checked_kwargs(
        self, trigger: str, kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if kwargs is None:
            return {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise InvalidFiring(
                f'the kwargs of {trigger!r} must be a mapping with string keys, not {kwargs!r}',
                uid=self.uid, trigger=trigger,
            )
        try:
            # As readers will see it, and so that later changes of the caller's do not show.
            copy: dict[str, Any] = self.storage.codec.copy(dict(kwargs))
        except EncodeError as exc:
            raise InvalidFiring(
                f'the kwargs of {trigger!r} cannot be serialized '
                f'({self.storage.settings.serializer}): {exc}',
                uid=self.uid, trigger=trigger,
            ) from exc
        return copy

    def _check_event_id(self, trigger: str, event_id: Any) -> None:
        problem = problem_with(event_id) if event_id is not None else None
        if problem:
            raise InvalidFiring(
                f'an event id {problem}: {event_id!r}', uid=self.uid, trigger=trigger
            )

    def _check_runner(self) -> None:
        runner = self.default_task_runner_name or self.storage.settings.runner
        if runner not in task_runners:
            raise UnknownKey('task runner', runner, task_runners.known())

    def _unheard(self, configuration: Configuration, trigger: str) -> None:
        application = self.storage.application
        reaction = self.storage.settings.unheard
        if reaction == 'ignore' or application.configuration_for(self.uid).listeners(trigger):
            return
        message = (
            f'no trigger task of session {self.uid!r} listens to {trigger!r}; '
            f'it knows: {", ".join(configuration) or "no trigger task at all"}'
        )
        if reaction == 'raise':
            raise UnheardTrigger(message, uid=self.uid, trigger=trigger)
        if trigger not in _warned_about:
            if len(_warned_about) >= _MOST_WARNED_ABOUT:
                _warned_about.clear()
            _warned_about.add(trigger)
            logger.warning(message)

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
            step.reconfigure(updated, apply_past=apply_past, named=changes)

        self.change(plans.whole, decide)

    def remove_tasks(self, names: Iterable[str]) -> None:
        """Take trigger tasks out of this session; their waiting instances are abandoned.

        Raises:
            InvalidConfiguration: The session has no such trigger task; nothing changed.
        """
        unwanted = {names} if isinstance(names, str) else set(names)

        def decide(step: Step) -> None:
            unknown = unwanted - set(step.session.configuration)
            if unknown:
                raise InvalidConfiguration(
                    f'session {self.uid!r} has no trigger task {sorted(unknown)}; '
                    f'it has: {", ".join(step.session.configuration)}'
                )
            step.reconfigure(step.session.configuration.without(unwanted), apply_past=False)

        self.change(plans.whole, decide)

    def cancel(self, reason: str | None = None) -> None:
        """Abandon what waits, now and for as long as the session lives."""
        self.change(plans.whole, lambda step: step.cancel(reason or 'by hand'))

    # ------------------------------------------------------------- by a person

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
            InvalidFiring: The kwargs cannot be serialized; nothing changed.
        """
        name = _name(failed_instance)
        kwargs = {
            trigger: self._checked_kwargs(trigger, value)
            for trigger, value in (replacement_kwargs or {}).items()
        }

        def decide(step: Step) -> None:
            instance = self._unhappy(step, name, Status.REPLAYED)
            step.replay(instance, replacement_kwargs=kwargs)

        outcome = self.change(plans.outcome(name), decide)
        new = self.storage[outcome.record.created[0]]
        self._hook('_post_replay', new, manager=outcome.manager)
        return new

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
            result: The simulated result, used with ``cascade``.

        Raises:
            InvalidTransition: It is neither failed nor revoked.
            InvalidFiring: The result cannot be serialized; nothing changed.
        """
        name = _name(failed_instance)
        kwargs = self._checked_kwargs(name, cascade_kwargs(result)) if cascade else None

        def decide(step: Step) -> None:
            metadata = {'result': result} if cascade else None
            step.skip(self._unhappy(step, name, Status.SKIPPED), metadata=metadata, cascade=kwargs)

        outcome = self.change(plans.outcome(name), decide)
        self._hook('_post_skip', self.storage[name], cascade, manager=outcome.manager)

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
        name, wanted = _name(task_instance), Status(status)
        kwargs = self._checked_kwargs(name, cascade_kwargs) if cascade else None
        facts = self._checked_kwargs(name, metadata)

        def decide(step: Step) -> None:
            step.set_status(
                self._instance(step, name), wanted, metadata=facts, cascade=kwargs
            )

        self.change(plans.outcome(name), decide)

    def update_instance_metadata(
        self, task_instance: TaskInstance | str, metadata: Mapping[str, Any]
    ) -> None:
        """Merge facts into an instance's metadata.

        Raises:
            InvalidFiring: They are no mapping or cannot be serialized.
        """
        name = _name(task_instance)
        facts = self._checked_kwargs(name, metadata)

        def decide(step: Step) -> None:
            instance = self._instance(step, name)
            instance.metadata.update(facts)
            step.touch(instance)

        self.change(plans.record_of(name), decide)

    def mark_instance_logs_resolved(self, task_instance: TaskInstance | str) -> None:
        """Note that somebody has seen to the warnings that an instance logged."""
        name = _name(task_instance)

        def decide(step: Step) -> None:
            instance = self._instance(step, name)
            instance.logs_resolved = True
            step.touch(instance)

        self.change(plans.record_of(name), decide)

    # ------------------------------------------------------------------ asking

    def get_unresolved_tasks(self) -> list[TaskConfig]:
        """Return the trigger tasks that have no instance, or an unresolved one."""
        return self.storage.get_unresolved_tasks()

    def get_unresolved_instances(self) -> list[TaskInstance]:
        """Return the instances that are not resolved."""
        return self.storage.get_unresolved_instances()

    def explain(self, task: str | None = None) -> list[Explanation]:
        """Say of each instance, or of those of one trigger task, why it stands where it does.

        Raises:
            InvalidConfiguration: The session has no trigger task of that name.
        """
        session = self.storage.load()
        configuration = session.configuration
        if task is not None and task not in configuration:
            raise InvalidConfiguration(
                f'session {self.uid!r} has no trigger task {task!r}; '
                f'it has: {", ".join(configuration) or "none"}'
            )
        return [
            explanation
            for config in configuration.values()
            if task in (None, config.name)
            for explanation in explain(config, session.instances_of(config.name))
        ]

    def _instance(self, step: Step, name: str) -> Any:
        instance = step.session.instance(name)
        if instance is None:
            raise UnknownInstance(self.uid, name)
        return instance

    def _unhappy(self, step: Step, name: str, wanted: Status) -> Any:
        instance = self._instance(step, name)
        if instance.status not in (Status.FAILED, Status.REVOKED):
            raise InvalidTransition(
                f'{name} of session {self.uid!r} is {instance.status}; only a failed or '
                f'revoked instance can be {wanted} by hand',
                instance=name, status=instance.status.value, wanted=wanted.value,
            )
        return instance


@trigger_managers.register('finalizing')
class FinalizingTriggerManager(TriggerManager):
    """Fires ``sessionFinalized`` once, when nothing that counts is unresolved."""

    finalizing = True


_warned_about: set[str] = set()
_MOST_WARNED_ABOUT = 10_000


def _name(instance: TaskInstance | str) -> str:
    return instance if isinstance(instance, str) else instance.name


def check_runners(configuration: Configuration) -> None:
    """Refuse a configuration that names a task runner which is not registered."""
    for task in configuration.values():
        if task.using is not None and task.using not in task_runners:
            raise InvalidConfiguration(
                str(UnknownKey('task runner', task.using, task_runners.known())),
                task=task.name,
                directive='using',
            )
