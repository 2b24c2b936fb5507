"""Contexts without workers, and an application in one process."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from celery._state import get_current_app

from celery_triggers.engine.instances import Instance
from celery_triggers.engine.names import split_instance_name
from celery_triggers.engine.transitions import Status
from celery_triggers.manager import Firing, TriggerManager
from celery_triggers.runners import ThreadingTaskRunner
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.storages.view import TaskInstance
from celery_triggers.task import TaskContext
from celery_triggers.wiring import services_of

__all__ = ['TriggersKit', 'context']


def context(
    trigger_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    uid: str | None = None,
    *,
    instance_name: str = 't_test#0',
    manager: TriggerManager | None = None,
) -> TaskContext:
    """Return a context with which a trigger task can be called as a function.

    ``ship(context({'paid': {'amount': 99}}))`` runs the code of ``ship`` here and now, with
    no broker and no storage. What it fires goes into a session in memory, which
    ``context.manager`` gives access to.

    ``context.task_instance`` is a made-up instance that runs.

    Args:
        trigger_kwargs: ``{trigger: kwargs}``, as the task would receive them.
        uid: The session's uid; a new one by default.
        instance_name: The name of the instance that the task believes to be.
        manager: The session's manager instead of one over a session in memory.
    """
    if manager is None:
        app: Any = get_current_app()
        # A space of its own: what a test fires here meets no other test.
        storage = MemoryStorageBackend(
            uid or f'test:{uuid.uuid4()}',
            f'memory://{uuid.uuid4()}',
            application=_Alone(services_of(app)),
        )
        manager = TriggerManager(storage)
    return _TestContext(manager, instance_name, dict(trigger_kwargs or {}))


class _Alone:
    """An application whose released tasks go nowhere."""

    def __init__(self, services: Any):
        self.settings = services.settings
        self.configuration_for = services.configuration_for
        self.async_result = services.async_result

    def check_storage(self, storage: Any) -> None:
        """Let sessions be anywhere: nobody else looks for them."""

    def dispatch(self, releases: Any) -> int:
        """Leave released instances scheduled, for the test to look at."""
        return 0

    def stored_outcome(self, task_id: str) -> None:
        """Know of no result."""

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        """Tell nobody."""

    def makes_claims(self, task_name: str) -> None:
        """Know of no task."""


class _TestContext(TaskContext):
    """A context without a run: it makes up what a worker would have stored."""

    @property
    def task_instance(self) -> TaskInstance:
        storage = self.manager.storage
        if self.instance_name in storage:
            return storage[self.instance_name]
        task, number = split_instance_name(self.instance_name)
        received = {trigger: dict(kwargs) for trigger, kwargs in self.trigger_kwargs.items()}
        record = Instance(task, number, status=Status.RUNNING, received=received)
        return TaskInstance(storage.application, self.uid, record, storage.tasks.get(task))

    def firings(self, trigger: str) -> list[dict[str, Any]]:
        given = [dict(self.trigger_kwargs[trigger])] if trigger in self else []
        return given + super().firings(trigger)


class TriggersKit:
    """An application set up for tests: sessions in memory, tasks in threads.

    Attributes:
        app: The Celery application.
    """

    def __init__(self, app: Any):
        self.app = app

    def fire(
        self,
        uid: str,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Firing:
        """Fire a trigger and wait until everything has run that follows from it."""
        firing: Firing = self.app.triggers.fire(uid, trigger_name, trigger_kwargs, **options)
        self.join()
        return firing

    def session(self, uid: str, manager: str | None = None) -> TriggerManager:
        """Return the trigger manager of a session."""
        found: TriggerManager = self.app.triggers.session(uid, manager)
        return found

    def join(self, timeout: float = 30.0) -> None:
        """Wait until no task runs any more.

        Raises:
            TimeoutError: A task still runs after ``timeout`` seconds.
        """
        ThreadingTaskRunner.join_all(timeout)

    def clear(self) -> None:
        """Forget every session."""
        MemoryStorageBackend.clear()
