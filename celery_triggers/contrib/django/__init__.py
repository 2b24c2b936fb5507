"""Sessions in a Django project's own database: a storage, an admin, checks.

Add ``'celery_triggers.contrib.django'`` to ``INSTALLED_APPS`` and run ``manage.py migrate``.
May import the storages' contract, ``relational``, and what lies below them.
"""
