"""Sessions in a cache of Django's, or in another that has the same few methods.

May import ``document`` and what all storages share, and no other storage.
"""

from celery_triggers.storages.cache.backend import CacheStorageBackend

__all__ = ['CacheStorageBackend']
