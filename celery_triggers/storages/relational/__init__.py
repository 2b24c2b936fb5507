"""What the storages in relational databases share: ``sql`` and Django's.

May import what all storages share, and neither SQLAlchemy nor Django.
"""

from celery_triggers.storages.relational.backend import RelationalStorageBackend

__all__ = ['RelationalStorageBackend']
