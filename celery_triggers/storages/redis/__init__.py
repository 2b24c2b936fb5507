"""Sessions in Redis: one server, Sentinel or Cluster, by scripts in Lua.

May import what all storages share, and no other storage.
"""

from celery_triggers.storages.redis.backend import RedisStorageBackend

__all__ = ['RedisStorageBackend']
