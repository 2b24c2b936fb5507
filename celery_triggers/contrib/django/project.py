"""The Celery application of the Django project, as the checks and the admin find it."""

from __future__ import annotations

from typing import Any

from celery import _state

from celery_triggers.exceptions import TriggersError

__all__ = ['chosen_storage', 'project_triggers']


def project_triggers() -> Any:
    """Return ``app.triggers`` of the project's Celery application, if it has made one.

    Celery would make an empty one for who asks for the current one.
    """
    # The modules' own names: what Celery exports are proxies that make one.
    made = _state._tls.current_app or _state.default_app  # type: ignore[attr-defined]
    return None if made is None else made.triggers


def chosen_storage() -> Any:
    """Return a storage ``django`` if the settings choose that one."""
    triggers = project_triggers()
    try:
        storage = triggers.storage('celery_triggers') if triggers is not None else None
    except TriggersError:
        # A check tells.
        return None
    return storage if storage is not None and storage.key == 'django' else None
