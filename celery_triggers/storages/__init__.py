"""Where sessions live: the contract, what all storages share, and each of them.

May import the engine and the settings; one storage never imports another. The names below
are imported when they are first used, since each storage needs a library of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_triggers.registry import storage_backends as storage_backends
    from celery_triggers.storages.base import StorageBackend as StorageBackend
    from celery_triggers.storages.cache import CacheStorageBackend as CacheStorageBackend
    from celery_triggers.storages.document import (
        DocumentStorageBackend as DocumentStorageBackend,
    )
    from celery_triggers.storages.memory import MemoryStorageBackend as MemoryStorageBackend
    from celery_triggers.storages.redis import RedisStorageBackend as RedisStorageBackend
    from celery_triggers.storages.sql import SQLStorageBackend as SQLStorageBackend
    from celery_triggers.storages.view import TaskInstance as TaskInstance

_HOMES = {
    'CacheStorageBackend': 'cache',
    'DocumentStorageBackend': 'document',
    'MemoryStorageBackend': 'memory',
    'RedisStorageBackend': 'redis',
    'SQLStorageBackend': 'sql',
    'StorageBackend': 'base',
    'TaskInstance': 'view',
}

__all__ = [*_HOMES, 'storage_backends']


def __getattr__(name: str) -> Any:
    if name == 'storage_backends':
        return import_module('celery_triggers.registry').storage_backends
    if name in _HOMES:
        return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
