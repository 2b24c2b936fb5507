"""The test kit: run tasks as functions, look at what a session did, test a storage of one's own.

May import everything but the worker; nothing imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_triggers.testing.cases import (
        TriggerManagerTestCaseMixin as TriggerManagerTestCaseMixin,
    )
    from celery_triggers.testing.kit import TriggersKit as TriggersKit
    from celery_triggers.testing.kit import context as context
    from celery_triggers.testing.media import Medium as Medium

_HOMES = {
    'Medium': 'media',
    'TriggerManagerTestCaseMixin': 'cases',
    'TriggersKit': 'kit',
    'context': 'kit',
}

__all__ = ['Medium', 'TriggerManagerTestCaseMixin', 'TriggersKit', 'context']


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
