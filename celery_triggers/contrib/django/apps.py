"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig


class TriggersConfig(AppConfig):
    """Keeps the sessions of trigger tasks in the project's database."""

    name = 'celery_triggers.contrib.django'
    label = 'celery_triggers'
    verbose_name = 'Celery triggers'
    default_auto_field = 'django.db.models.BigAutoField'

    def ready(self) -> None:
        from celery_triggers.contrib.django import checks  # noqa: F401  (registers them)
