"""What the lower floors need of an application, and where they find the current one.

``RedisStorageBackend(uid)`` without a URL means the storage of the current Celery
application. Which one that is only :mod:`celery_triggers.app` knows, the top of the
house: it is asked late and by name, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from celery_triggers.engine.configuration import Configuration
from celery_triggers.settings import Settings


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """How a task ended, as a result backend keeps it.

    Attributes:
        state: ``'SUCCESS'``, ``'FAILURE'`` or ``'REVOKED'``.
        result: What it returned, or the exception.
        at: When that was stored, in milliseconds of its worker's clock; ``None`` where the
            backend does not say.
    """

    state: str
    result: Any
    at: int | None = None


class Application(Protocol):
    """What storages and managers ask of an application, see :mod:`celery_triggers.services`."""

    settings: Settings

    def configuration_for(self, uid: str) -> Configuration:
        """Return the union of the workflows of a uid."""

    def check_storage(self, storage: Any) -> None:
        """Refuse changes of sessions where no worker would look for them."""

    def dispatch(self, releases: Sequence[Any]) -> int:
        """Hand released instances to their task runners; return how many were taken."""

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        """Return how a task ended, if the result backend knows that it has."""

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        """Store in the result backend that a task waits at a gate."""

    def makes_claims(self, task_name: str) -> bool | None:
        """Tell whether deliveries of a task claim; ``None``: it is not registered here."""

    def async_result(self, task_id: str) -> Any:
        """Return the Celery result of a task."""


def services_of(app: Any) -> Any:
    """Return the :class:`~celery_triggers.services.Services` of a Celery application."""
    return import_module('celery_triggers.app').services_of(app)


def services_behind(application: Any) -> Any:
    """Return what stands behind ``app.triggers``, where an application gives that."""
    return getattr(application, '_services', application)


def current_application() -> Application:
    """Return what stands behind ``app.triggers`` of the current Celery application."""
    application: Application = import_module('celery_triggers.app').current_services()
    return application
