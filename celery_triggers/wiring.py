"""What the lower floors need of an application, and where they find the current one.

``RedisStorageBackend(uid)`` without a URL means the storage of the current Celery
application. Which one that is only :mod:`celery_triggers.app` knows, the top of the
house: it is asked late and by name, here and nowhere else.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from celery_triggers.engine.configuration import Configuration
from celery_triggers.settings import Settings


class Application(Protocol):
    """What storages and managers ask of an application: ``app.triggers``."""

    settings: Settings

    def configuration_for(self, uid: str) -> Configuration:
        """Return the union of the workflows of a uid."""

    def check_storage(self, storage: Any) -> None:
        """Refuse changes of sessions where no worker would look for them."""

    def dispatch(self, release: Any) -> None:
        """Hand a released instance to its task runner."""

    def async_result(self, task_id: str) -> Any:
        """Return the Celery result of a task."""


def current_application() -> Application:
    """Return ``app.triggers`` of the current Celery application."""
    application: Application = import_module('celery_triggers.app').current_triggers()
    return application
