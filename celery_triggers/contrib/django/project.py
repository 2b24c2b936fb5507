"""The Celery application of the Django project, as the checks and the admin find it."""

from __future__ import annotations

from typing import Any

from celery import _state

from celery_triggers.exceptions import TriggersError
from celery_triggers.wiring import services_of

__all__ = ['chosen_storage', 'project_services', 'project_triggers']


def project_triggers() -> Any:
    """Return ``app.triggers`` of the project's Celery application, if it has made one."""
    made = _project_app()
    return None if made is None else made.triggers


def project_services() -> Any:
    """Return what stands behind :func:`project_triggers`."""
    made = _project_app()
    return None if made is None else services_of(made)


def _project_app() -> Any:
    # The modules' own names: what Celery exports are proxies that would make an empty one for
    # who asks for the current one.
    return _state._tls.current_app or _state.default_app  # type: ignore[attr-defined]


def chosen_storage() -> Any:
    """Return a storage ``django`` if the settings choose that one."""
    services = project_services()
    try:
        storage = services.storage('celery_triggers') if services is not None else None
    except TriggersError:
        # A check tells.
        return None
    return storage if storage is not None and storage.key == 'django' else None
