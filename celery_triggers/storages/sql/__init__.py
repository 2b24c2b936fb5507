"""Sessions in PostgreSQL, MariaDB, MySQL or SQLite, by SQLAlchemy.

May import ``relational`` and what all storages share, and no other storage.
"""

from celery_triggers.storages.sql.backend import SQLStorageBackend

__all__ = ['SQLStorageBackend']
