"""Run Celery tasks after several things have happened, in any order.

The names below are imported when they are first used, so that importing this package
costs next to nothing.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

import celery_triggers.hook as _hook  # noqa: F401  (attaches itself to Celery)

if TYPE_CHECKING:
    from celery_triggers.app import Celery as Celery
    from celery_triggers.app import shared_trigger_task as shared_trigger_task
    from celery_triggers.canvas import fire as fire
    from celery_triggers.canvas import gate as gate
    from celery_triggers.contrib.django.storage import DjangoStorageBackend as DjangoStorageBackend
    from celery_triggers.engine.forms import all_of as all_of
    from celery_triggers.engine.forms import any_of as any_of
    from celery_triggers.engine.forms import at_least as at_least
    from celery_triggers.engine.forms import kwarg as kwarg
    from celery_triggers.engine.forms import on as on
    from celery_triggers.engine.task_config import TaskConfig as TaskConfig
    from celery_triggers.engine.transitions import Status as Status
    from celery_triggers.manager import FinalizingTriggerManager as FinalizingTriggerManager
    from celery_triggers.manager import Firing as Firing
    from celery_triggers.manager import TriggerManager as TriggerManager
    from celery_triggers.registry import storage_backends as storage_backends
    from celery_triggers.registry import task_runners as task_runners
    from celery_triggers.registry import trigger_managers as trigger_managers
    from celery_triggers.runners import BaseTaskRunner as BaseTaskRunner
    from celery_triggers.runners import CeleryTaskRunner as CeleryTaskRunner
    from celery_triggers.runners import ThreadingTaskRunner as ThreadingTaskRunner
    from celery_triggers.storages import CacheStorageBackend as CacheStorageBackend
    from celery_triggers.storages import DocumentStorageBackend as DocumentStorageBackend
    from celery_triggers.storages import MemoryStorageBackend as MemoryStorageBackend
    from celery_triggers.storages import RedisStorageBackend as RedisStorageBackend
    from celery_triggers.storages import SQLStorageBackend as SQLStorageBackend
    from celery_triggers.storages import StorageBackend as StorageBackend
    from celery_triggers.storages import TaskInstance as TaskInstance
    from celery_triggers.sweep import SweepReport as SweepReport
    from celery_triggers.task import TaskContext as TaskContext
    from celery_triggers.task import TriggerTask as TriggerTask
    from celery_triggers.task import current_context as current_context

__version__ = '0.1.0'

_HOMES = {
    'BaseTaskRunner': 'runners',
    'CacheStorageBackend': 'storages',
    'Celery': 'app',
    'CeleryTaskRunner': 'runners',
    'DjangoStorageBackend': 'contrib.django.storage',
    'DocumentStorageBackend': 'storages',
    'FinalizingTriggerManager': 'manager',
    'Firing': 'manager',
    'MemoryStorageBackend': 'storages',
    'RedisStorageBackend': 'storages',
    'SQLStorageBackend': 'storages',
    'StorageBackend': 'storages',
    'Status': 'engine.transitions',
    'SweepReport': 'sweep',
    'TaskConfig': 'engine.task_config',
    'TaskContext': 'task',
    'TaskInstance': 'storages',
    'ThreadingTaskRunner': 'runners',
    'TriggerManager': 'manager',
    'TriggerTask': 'task',
    'all_of': 'engine.forms',
    'any_of': 'engine.forms',
    'at_least': 'engine.forms',
    'current_context': 'task',
    'fire': 'canvas',
    'gate': 'canvas',
    'kwarg': 'engine.forms',
    'on': 'engine.forms',
    'shared_trigger_task': 'app',
    'storage_backends': 'registry',
    'task_runners': 'registry',
    'trigger_managers': 'registry',
}

# One that cannot be imported before Django is set up is left out of a star import.
__all__ = ['__version__', *(name for name in _HOMES if name != 'DjangoStorageBackend')]


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None
    return getattr(_import_module(f'{__name__}.{home}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
