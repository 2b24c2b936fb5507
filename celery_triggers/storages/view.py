"""A session as an application sees it: its trigger tasks and instances, always current."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.names import split_instance_name
from celery_triggers.engine.session import FiringRecord, Plan, Session
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import (
    BY_HAND,
    RESOLVED,
    TRANSITIONS,
    UNHAPPY,
    Event,
    Status,
)
from celery_triggers.exceptions import UnknownInstance
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.snapshot import Snapshot
from celery_triggers.wiring import Application

__all__ = ['SessionView', 'TaskInstance']


def moment(milliseconds: int) -> datetime:
    """Return a storage's time as an aware datetime in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)


class TaskInstance:
    """One execution of a trigger task, as it was when it was read.

    Attributes:
        uid: The session.
        name: ``t_ship#0``.
        config: The task's configuration; ``None`` if the session no longer has it.
        kwargs: ``{trigger: kwargs}``, static ones merged under those that were fired.
        depth: How many replays led to it.
    """

    def __init__(
        self, application: Application, uid: str, instance: Instance, config: TaskConfig | None
    ):
        self._application = application
        self.uid = uid
        self.config = config
        self.record = instance
        self.kwargs = instance.kwargs(config)

    def __repr__(self) -> str:
        return f'<TaskInstance {self.name} {self.status} of {self.uid!r}>'

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskInstance):
            return NotImplemented
        return (self.uid, self.name) == (other.uid, other.name)

    def __hash__(self) -> int:
        return hash((self.uid, self.name))

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def task(self) -> str:
        """The name of its trigger task."""
        return self.record.task

    @property
    def status(self) -> Status:
        return self.record.status

    @property
    def metadata(self) -> dict[str, Any]:
        return self.record.metadata

    @property
    def task_id(self) -> str | None:
        """The id of its Celery task: from its release on, of a gate from the beginning."""
        return self.record.task_id or None

    @property
    def attempt(self) -> int:
        return self.record.attempt

    @property
    def depth(self) -> int:
        return self.record.depth

    @property
    def result(self) -> Any:
        """What it returned, if it finished."""
        return self.record.metadata.get('result')

    @property
    def async_result(self) -> Any:
        """Its :class:`celery.result.AsyncResult`; ``None`` where it has no task id yet."""
        if not self.task_id:
            return None
        return self._application.async_result(self.task_id)

    @property
    def last_modified(self) -> datetime:
        """When its status last changed (UTC)."""
        return moment(max(self.record.changed, self.record.claimed))

    @property
    def timestamps(self) -> dict[str, datetime]:
        """When it last came to each status (UTC)."""
        return {status: moment(time) for status, time in self.record.timestamps().items()}

    @property
    def deadline(self) -> datetime | None:
        """When it expires if it still waits (UTC)."""
        at = self.record.deadline(self.config)
        return moment(at) if at else None

    @property
    def log_level(self) -> int:
        """The highest level that was logged through its logger context."""
        return self.record.log_level

    @property
    def log_level_name(self) -> str:
        return logging.getLevelName(self.log_level)

    @property
    def logs_resolved(self) -> bool:
        """Whether nobody needs to look at its logs (any more)."""
        return self.record.logs_resolved or self.log_level < logging.WARNING

    @property
    def can_run(self) -> bool:
        """Whether its condition holds and it has not been released."""
        return self.can_schedule and self.config is not None and self.config.wanted.holds(
            self.record.received
        )

    @property
    def can_schedule(self) -> bool:
        return self.status in TRANSITIONS[Event.RELEASE]

    @property
    def can_abandon(self) -> bool:
        return self.status in BY_HAND[Status.ABANDONED]

    @property
    def can_replay(self) -> bool:
        """Whether a person can replay it."""
        return self.status in UNHAPPY

    @property
    def can_skip(self) -> bool:
        """Whether a person can skip it."""
        return self.status in UNHAPPY

    @property
    def is_resolved(self) -> bool:
        return self.status in RESOLVED


class SessionView(ABC):
    """What an application may ask of a session's storage. Nothing is cached."""

    uid: str
    application: Application

    @abstractmethod
    def read(
        self, plan: Plan, expected: Configuration | None = None, passing: str = ''
    ) -> Snapshot:
        """Read a part of the session."""

    def load(self) -> Session:
        """Return the whole session as it is now."""
        return self.read(Plan(whole=True)).session

    @property
    def exists(self) -> bool:
        """Whether the session has been touched."""
        return self.read(Plan()).exists

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The trigger tasks of the session by name; empty before it is first touched."""
        return dict(self.read(Plan()).session.configuration)

    @property
    def instances(self) -> dict[str, TaskInstance]:
        """All instances by name, in the order of task names and numbers."""
        return self._instances(self.load())

    @property
    def metadata(self) -> dict[str, Any]:
        """The session's metadata."""
        return self.read(Plan()).session.head.metadata

    @property
    def latest_kwargs(self) -> dict[str, dict[str, Any]]:
        """The kwargs of each trigger's latest firing."""
        return {
            name: latest.kwargs
            for name, latest in sorted(self.load().latest.items())
            if latest.count
        }

    @property
    def history(self) -> list[FiringRecord]:
        """The firings in the order in which they were applied, the latest last."""
        return self.load().history

    def __getitem__(self, name: str) -> TaskInstance:
        """Return the instance of this name.

        Raises:
            UnknownInstance: There is none.
        """
        try:
            split_instance_name(name)
        except ValueError:
            raise UnknownInstance(self.uid, name) from None
        session = self.read(Plan(instances=frozenset({name}))).session
        instance = session.instances.get(name)
        if instance is None:
            raise UnknownInstance(self.uid, name)
        return self.wrap(session, instance)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self[name])
        except UnknownInstance:
            return False

    def __iter__(self) -> Iterator[TaskInstance]:
        return iter(self.instances.values())

    def instances_of_task(self, task: str | TaskConfig) -> list[TaskInstance]:
        """Return a trigger task's instances by number."""
        name = task.name if isinstance(task, TaskConfig) else task
        return [instance for instance in self if instance.task == name]

    def get_unresolved_tasks(self) -> list[TaskConfig]:
        """Return the trigger tasks that have no instance, or an unresolved one."""
        session = self.load()
        return [
            config
            for name, config in session.configuration.items()
            if not session.counts_of(name).total or session.counts_of(name).unresolved
        ]

    def get_unresolved_instances(self) -> list[TaskInstance]:
        """Return the instances that are not resolved."""
        return [instance for instance in self if not instance.is_resolved]

    def get_instances_with_unresolved_logs(self) -> list[TaskInstance]:
        """Return the instances that logged a warning or worse that nobody has resolved."""
        return [instance for instance in self if not instance.logs_resolved]

    def create_instance(self, task: str | TaskConfig) -> TaskInstance:
        """Make an instance by hand: see :meth:`.TriggerManager.create_instance`."""
        made: TaskInstance = self._manager().create_instance(task)
        return made

    def clone_instance(self, instance: str | TaskInstance) -> TaskInstance:
        """Copy an instance by hand: see :meth:`.TriggerManager.clone_instance`."""
        made: TaskInstance = self._manager().clone_instance(instance)
        return made

    def _manager(self) -> Any:
        key = self.read(Plan()).session.head.manager or self.application.settings.manager
        return trigger_managers.get(key, self)

    def debug_repr(self) -> str:
        """Return the whole session as text for people."""
        session = self.load()
        head = session.head
        lines = [f'session {self.uid!r}: {head.firings} firings, {head.unresolved} unresolved']
        if head.cancelled is not None:
            lines.append(f'  cancelled: {head.cancelled}')
        lines += [
            f'  fired {name} x{latest.count}: {latest.kwargs!r}'
            for name, latest in sorted(session.latest.items())
            if latest.count
        ]
        for instance in self._instances(session).values():
            lines.append(f'  {instance.name} {instance.status} {instance.kwargs!r}')
        return '\n'.join(lines)

    def wrap(self, session: Session, instance: Instance) -> TaskInstance:
        """Return an instance's record as applications see it."""
        config = session.config_of(instance)
        return TaskInstance(self.application, self.uid, instance, config)

    def _instances(self, session: Session) -> dict[str, TaskInstance]:
        ordered = sorted(session.instances.values(), key=lambda i: (i.task, i.number))
        return {instance.name: self.wrap(session, instance) for instance in ordered}
