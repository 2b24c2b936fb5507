"""What every part of this room needs of a trigger manager: its session, its key, its hooks."""

from __future__ import annotations

from typing import ClassVar

from celery_triggers.exceptions import TriggersError
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.view import TaskInstance

__all__ = ['Controller', 'is_finalizing', 'key_of']


class Controller:
    """Controls one session; the base of all trigger managers.

    Args:
        storage: The session's storage backend.
    """

    #: Whether ``sessionFinalized`` is fired when nothing that counts is unresolved.
    finalizing: ClassVar[bool] = False

    #: The registry key of the runner for tasks without ``using``; ``None``: the setting
    #: ``triggers_runner``.
    default_task_runner_name: ClassVar[str | None] = None

    def __init__(self, storage: StorageBackend):
        self.storage = storage

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.storage!r}>'

    @property
    def uid(self) -> str:
        """The session's uid."""
        return self.storage.uid

    @property
    def key(self) -> str:
        """The registry key of this manager's class.

        Raises:
            TriggersError: It has none, so that no worker could find it.
        """
        key = key_of(type(self))
        if key is None:
            raise TriggersError(
                f'{type(self).__qualname__} is not registered, so workers could not serve its '
                "sessions: put @trigger_managers.register('<key>') on it, or offer it in the "
                "entry point group 'celery_triggers.managers'"
            )
        return key

    def _post_fire(self, trigger_name: str, tasks_scheduled: list[TaskInstance]) -> None:
        """Called after a firing was applied and what it released was sent.

        Also for cascades and outcomes, in the process that made the change, at most
        once. An exception is logged and undoes nothing.
        """

    def _post_replay(self, task_instance: TaskInstance) -> None:
        """Called after an instance was replayed, by hand or by its own code, with the new one."""

    def _post_skip(self, task_instance: TaskInstance, cascade: bool) -> None:
        """Called after an instance was skipped, by hand or by its own code."""


_keys: dict[type, str | None] = {}


def key_of(class_: type) -> str | None:
    if class_ not in _keys or _keys[class_] is None:
        _keys[class_] = trigger_managers.key_of(class_)
    return _keys[class_]


def is_finalizing(key: str) -> bool:
    return bool(trigger_managers.get_class(key).finalizing)
