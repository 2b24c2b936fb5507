"""Assertions about a session, for :mod:`unittest` and for whoever likes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import UnknownInstance
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.view import TaskInstance

__all__ = ['TriggerManagerTestCaseMixin']

_ANY = object()


class TriggerManagerTestCaseMixin:
    """Assertions about the session of ``self.manager``, which the test case sets."""

    manager: TriggerManager

    def assertInstanceFinished(self, instance_name: str, expected_result: Any = _ANY) -> None:
        """Fail unless the instance finished, with this result if one is given."""
        instance = self._assert_status(instance_name, Status.FINISHED)
        if expected_result is not _ANY and instance.result != expected_result:
            raise AssertionError(
                f'{instance_name} returned {instance.result!r}, not {expected_result!r}'
            )

    def assertInstanceFailed(
        self, instance_name: str, exc_type: type[BaseException] | None = None
    ) -> None:
        """Fail unless the instance failed, with an exception of this type if one is given."""
        instance = self._assert_status(instance_name, Status.FAILED)
        found = instance.metadata.get('exception', {}).get('type')
        if exc_type is not None and found != exc_type.__qualname__:
            raise AssertionError(
                f'{instance_name} failed with {found}, not with {exc_type.__qualname__}'
            )

    def assertInstanceAbandoned(self, instance_name: str) -> None:
        """Fail unless the instance was abandoned."""
        self._assert_status(instance_name, Status.ABANDONED)

    def assertInstanceSkipped(self, instance_name: str) -> None:
        """Fail unless the instance was skipped."""
        self._assert_status(instance_name, Status.SKIPPED)

    def assertInstanceReplayed(self, instance_name: str) -> None:
        """Fail unless the instance was replayed."""
        self._assert_status(instance_name, Status.REPLAYED)

    def assertInstanceUnstarted(self, instance_name: str) -> None:
        """Fail unless the instance waits."""
        self._assert_status(instance_name, Status.UNSTARTED)

    def assertInstanceMissing(self, instance_name: str) -> None:
        """Fail if there is an instance of this name."""
        if instance_name in self.manager.storage:
            raise AssertionError(f'{self._where(instance_name)} should not exist')

    def assertUnresolvedTasks(self, expected: Iterable[str]) -> None:
        """Fail unless exactly these trigger tasks are unresolved."""
        found = sorted(task.name for task in self.manager.get_unresolved_tasks())
        self._assert_names('unresolved tasks', found, expected)

    def assertUnresolvedInstances(self, expected: Iterable[str]) -> None:
        """Fail unless exactly these instances are unresolved."""
        found = sorted(instance.name for instance in self.manager.get_unresolved_instances())
        self._assert_names('unresolved instances', found, expected)

    def _assert_status(self, name: str, status: Status) -> TaskInstance:
        try:
            instance = self.manager.storage[name]
        except UnknownInstance as exc:
            raise AssertionError(
                f'{exc}; the session is:\n{self.manager.storage.debug_repr()}'
            ) from exc
        if instance.status is not status:
            reason = instance.metadata.get('exception', {}).get('traceback', '')
            raise AssertionError(f'{self._where(name)}, not {status}\n{reason}'.rstrip())
        return instance

    def _where(self, name: str) -> str:
        instance = self.manager.storage[name]
        texts = [e.text for e in self.manager.explain() if e.instance == name]
        # A trigger task that the session no longer has is not explained.
        text = texts[0] if texts else f'{name} is {instance.status}'
        return f'in session {self.manager.uid!r} {text}'

    @staticmethod
    def _assert_names(what: str, found: list[str], expected: Iterable[str]) -> None:
        if found != sorted(expected):
            raise AssertionError(f'{what}: {found}, expected {sorted(expected)}')
