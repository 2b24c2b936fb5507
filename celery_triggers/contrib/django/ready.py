"""Sees to it that Django is there before the models are imported."""

from __future__ import annotations

from celery_triggers.exceptions import MissingExtra, StorageNotConfigured

try:
    import django
    from django.apps import apps
    from django.core.exceptions import ImproperlyConfigured
except ImportError as exc:
    raise MissingExtra('the storage backend django', 'django') from exc

__all__ = ['APP', 'ensure_ready']

APP = 'celery_triggers.contrib.django'


def ensure_ready() -> None:
    """Set Django up if nobody has, as Celery does later in a worker's life.

    Raises:
        StorageNotConfigured: It has no settings, or our application is not among the
            installed ones.
    """
    if not apps.models_ready:
        try:
            django.setup()
        except ImproperlyConfigured as exc:
            raise StorageNotConfigured(
                f'the storage django needs a Django project: {exc}'
            ) from exc
    if not apps.is_installed(APP):
        raise StorageNotConfigured(
            f"the storage django needs its tables: add '{APP}' to INSTALLED_APPS and run "
            'manage.py migrate'
        )
