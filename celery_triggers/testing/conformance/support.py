"""What the tests of storages share: looking at a session, losing answers, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.release import header_of
from celery_triggers.storages.base import StorageBackend
from celery_triggers.testing.media import FakeApplication

T = TypeVar('T')


def application_of(manager: TriggerManager) -> FakeApplication:
    application = manager.storage.application
    assert isinstance(application, FakeApplication)
    return application


def delivery(manager: TriggerManager, name: str, token: str = 'token') -> Delivery:
    """Return a delivery of an instance's present attempt."""
    instance = manager.storage[name]
    incarnation = manager.storage.load().head.incarnation
    return Delivery(manager, header_of(manager, instance, incarnation), token)


def statuses(manager: TriggerManager) -> dict[str, str]:
    """Return ``{instance: status}``."""
    return {name: str(i.status) for name, i in manager.storage.instances.items()}


def fired(manager: TriggerManager) -> list[str]:
    """Return the triggers that were applied, in order."""
    return [record.trigger for record in manager.storage.history]


# ------------------------------------------------------------------ lost answers


def lose_answer(storage: StorageBackend) -> None:
    """Let the next commit be applied and its answer be lost."""

    def spoil(commit: Callable[[], Any]) -> Any:
        commit()
        raise StorageUnavailable('the answer was lost', outcome_unknown=True)

    _wrap_next_commit(storage, spoil)


def repeat_commit(storage: StorageBackend, between: Callable[[], Any] | None = None) -> None:
    """Let the medium's client repeat the next commit, whose first answer was lost.

    Args:
        between: Is called after the commit was applied and before it is repeated.
    """

    def spoil(commit: Callable[[], Any]) -> Any:
        commit()
        if between is not None:
            between()
        return commit()

    _wrap_next_commit(storage, spoil)


def before_commit(storage: StorageBackend, interfere: Callable[[], Any]) -> None:
    """Call ``interfere`` between the next decision and its commit."""

    def spoil(commit: Callable[[], Any]) -> Any:
        interfere()
        return commit()

    _wrap_next_commit(storage, spoil)


def _wrap_next_commit(storage: Any, spoil: Callable[[Callable[[], Any]], Any]) -> None:
    real = storage._commit

    def wrapped(commit: Any, request: Any) -> Any:
        storage._commit = real
        return spoil(lambda: real(commit, request))

    storage._commit = wrapped


# ----------------------------------------------------------------------- waiting


def eventually(condition: Callable[[], T], what: str = '', timeout: float = 30.0) -> T:
    """Ask until the answer is true, and return it.

    Raises:
        AssertionError: It was not within so many seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.01
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(
                f'not within {timeout} seconds: {what or condition}; last: {answer!r}'
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
