"""Storages that keep a session as one document: two methods make one.

May import what all storages share, and no other storage.
"""

from celery_triggers.storages.document.backend import DocumentStorageBackend

__all__ = ['DocumentStorageBackend']
