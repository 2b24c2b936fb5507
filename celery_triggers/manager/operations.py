"""What a person may do with the instances of a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kombu.exceptions import EncodeError

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
from celery_triggers.manager.controller import Controller
from celery_triggers.storages.view import TaskInstance

__all__ = ['Operations']


class Operations(Controller):
    """The part of a trigger manager that ends, repeats and mends instances by hand."""

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
        name = _name(failed_instance)
        kwargs = {
            trigger: self.checked_kwargs(trigger, value)
            for trigger, value in (replacement_kwargs or {}).items()
        }

        def decide(step: Step) -> None:
            instance = self._unhappy(step, name, Status.REPLAYED)
            self._check_replacement(step.session.config_of(instance), instance, kwargs)
            step.replay(instance, replacement_kwargs=kwargs)

        outcome = self.change(plans.outcome(name), decide)
        return self.storage[outcome.record.created[0]]

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
        name = _name(task_instance)

        def decide(step: Step) -> None:
            instance = self._instance(step, name)
            if instance.status is not Status.SCHEDULED:
                raise InvalidTransition(
                    f'{name} of session {self.uid!r} is {instance.status}; only a scheduled '
                    'instance can be sent again',
                    instance=name, status=instance.status.value, wanted=Status.SCHEDULED.value,
                )
            step.resend(instance)

        self.change(plans.record_of(name), decide)

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
        name = _name(failed_instance)
        given = self.checked_kwargs(name, cascade_kwargs(result)) if cascade else None

        def decide(step: Step) -> None:
            instance = self._unhappy(step, name, Status.SKIPPED)
            if not cascade:
                step.skip(instance)
                return
            known = instance.metadata.get('result') if result is None else result
            kwargs = given if result is not None else cascade_kwargs(known)
            step.skip(instance, metadata={'result': known}, cascade=kwargs)

        self.change(plans.outcome(name), decide)

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
        kwargs = self.checked_kwargs(name, cascade_kwargs) if cascade else None
        facts = self.checked_kwargs(name, metadata)

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
        facts = self.checked_kwargs(name, metadata)

        def decide(step: Step) -> None:
            instance = self._instance(step, name)
            # Together they must still be what the serializer can take.
            instance.metadata = self.checked_kwargs(name, {**instance.metadata, **facts})
            step.draft.touch(instance)

        self.change(plans.record_of(name), decide)

    def mark_instance_logs_resolved(self, task_instance: TaskInstance | str) -> None:
        """Note that somebody has seen to the warnings that an instance logged."""
        name = _name(task_instance)

        def decide(step: Step) -> None:
            instance = self._instance(step, name)
            instance.logs_resolved = True
            step.draft.touch(instance)

        self.change(plans.record_of(name), decide)

    def create_instance(self, task: TaskConfig | str) -> TaskInstance:
        """Make the next instance of a trigger task by hand.

        It receives the latest firings that its condition names, but for ``andEvery``. If
        its condition holds it is released at once, if ``unless`` holds it is abandoned.

        Raises:
            InvalidConfiguration: The session has no such trigger task; nothing changed.
        """
        name = task if isinstance(task, str) else task.name

        def decide(step: Step) -> None:
            step.create(self._config(step, name))

        outcome = self.change(plans.whole, decide)
        return self.storage[outcome.record.created[0]]

    def clone_instance(self, instance: TaskInstance | str) -> TaskInstance:
        """Make another instance with what this one received; this one stays as it is.

        If its condition holds it is released at once, if ``unless`` holds it is abandoned.

        Raises:
            UnknownInstance: There is no such instance.
            InvalidConfiguration: The session no longer has its trigger task.
        """
        name = _name(instance)

        def decide(step: Step) -> None:
            original = self._instance(step, name)
            step.copy(self._config(step, original.task), original)

        outcome = self.change(plans.whole, decide)
        return self.storage[outcome.record.created[0]]

    def _config(self, step: Step, task: str) -> TaskConfig:
        configuration = step.session.configuration
        if task not in configuration:
            raise self._no_task(configuration, task)
        return configuration[task]

    def _no_task(self, configuration: Iterable[str], *names: str) -> InvalidConfiguration:
        missing = ', '.join(map(repr, names))
        return InvalidConfiguration(
            f'session {self.uid!r} has no trigger task {missing}; '
            f'it has: {", ".join(configuration) or "none"}'
        )

    def _check_replacement(
        self, config: TaskConfig | None, instance: Any, kwargs: Mapping[str, Any]
    ) -> None:
        known = {*instance.received, *(leaf.key for leaf in (config.leaves if config else ()))}
        known.update(config.with_params if config else ())
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise InvalidFiring(
                f'{instance.name} of session {self.uid!r} has nothing to do with '
                f'{", ".join(unknown)}; its triggers are: {", ".join(sorted(known))}',
                uid=self.uid, trigger=unknown[0],
            )

    def checked_kwargs(
        self, trigger: str, kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return a copy of a trigger's kwargs, as readers of the storage will see them.

        Raises:
            InvalidFiring: They are no mapping with string keys or cannot be serialized.
        """
        if kwargs is None:
            return {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise InvalidFiring(
                f'the kwargs of {trigger!r} must be a mapping with string keys, not {kwargs!r}',
                uid=self.uid, trigger=trigger,
            )
        try:
            # So that later changes of the caller's do not show.
            copy: dict[str, Any] = self.storage.codec.copy(dict(kwargs))
        except EncodeError as exc:
            raise InvalidFiring(
                f'the kwargs of {trigger!r} cannot be serialized '
                f'({self.storage.settings.serializer}): {exc}',
                uid=self.uid, trigger=trigger,
            ) from exc
        return copy

    def _instance(self, step: Step, name: str) -> Any:
        instance = step.session.instance(name)
        if instance is None:
            raise UnknownInstance(self.uid, name)
        return instance

    def _unhappy(self, step: Step, name: str, wanted: Status) -> Any:
        instance = self._instance(step, name)
        if instance.status not in UNHAPPY:
            raise InvalidTransition(
                f'{name} of session {self.uid!r} is {instance.status}; only a failed or '
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
