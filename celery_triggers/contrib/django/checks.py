"""System checks: what ``manage.py check`` says about a wrong configuration.

Nothing is asked of a server, so they also run where none is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from django import VERSION
from django.conf import settings as django_settings
from django.core import checks
from django.core.checks import CheckMessage, Error, register
from django.db import connections, router

from celery_triggers.contrib.django.models import Session
from celery_triggers.contrib.django.project import chosen_storage, project_services
from celery_triggers.exceptions import InvalidSetting, TriggersError, UnknownKey
from celery_triggers.registry import task_runners, trigger_managers
from celery_triggers.settings import DEFAULTS

__all__ = ['check_database', 'check_deployment', 'check_settings']

TAG = 'celery_triggers'


@register(TAG)
def check_settings(**_: Any) -> list[CheckMessage]:
    """Check what the settings say, and whether there is what they name."""
    services = project_services()
    if services is None:
        return [
            checks.Warning(
                'There is no Celery application, so its settings cannot be checked.',
                hint="Make it in <project>/celery.py and import it in <project>/__init__.py: "
                "'from .celery import app as celery_app'.",
                id='celery_triggers.W001',
            )
        ]
    try:
        settings = services.settings.frozen()
        trigger_managers.get_class(settings.manager)
        task_runners.get_class(settings.runner)
        services.storage('celery_triggers')
    except InvalidSetting as exc:
        return [Error(str(exc), id='celery_triggers.E001')]
    except UnknownKey as exc:
        return [Error(str(exc), id='celery_triggers.E002')]
    except TriggersError as exc:
        return [Error(str(exc), id='celery_triggers.E003')]
    return [*_unknown_settings(services), *_unchosen_storage(services)]


def _unknown_settings(services: Any) -> Iterator[CheckMessage]:
    namespace = services.app.namespace
    start = f'{namespace}_TRIGGERS_' if namespace else ''
    known = {f'{namespace}_{name}'.upper(): name for name in DEFAULTS}
    for name in dir(django_settings):
        if start and name.startswith(start) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield checks.Warning(
                f'celery_triggers knows no setting {name}.',
                hint=f'Did you mean {near[0]}?' if near else None,
                id='celery_triggers.W002',
            )


def _unchosen_storage(services: Any) -> Iterator[CheckMessage]:
    key = services.settings.storage_location()[0]
    if services.app.conf.get('triggers_storage') is None:
        yield checks.Warning(
            f'triggers_storage is not set, so sessions are kept in {key}, since Celery uses it '
            'too, and not in the tables of celery_triggers.contrib.django.',
            hint=f"Set it to 'django', or to '{key}' if that is meant.",
            id='celery_triggers.W003',
        )


@register(TAG)
def check_database(**_: Any) -> list[CheckMessage]:
    """Check the database of the storage ``django``."""
    storage = chosen_storage()
    if storage is None:
        return []
    alias = storage.alias
    found = connections[alias].settings_dict
    messages: list[CheckMessage] = []
    if not router.allow_migrate_model(alias, Session):
        messages.append(
            Error(
                f'The sessions of trigger tasks are kept in the database {alias!r}, and '
                'DATABASE_ROUTERS let no tables be made for them there.',
                hint="Let allow_migrate() return True for the app label 'celery_triggers' and "
                'this database.',
                id='celery_triggers.E004',
            )
        )
    if not found['AUTOCOMMIT']:
        messages.append(
            Error(
                f'AUTOCOMMIT is off in the database {alias!r}, so nobody could tell when a '
                'change of a session is committed.',
                id='celery_triggers.E005',
            )
        )
    if connections[alias].vendor == 'sqlite' and str(found['NAME']) == ':memory:':
        messages.append(
            Error(
                f'The database {alias!r} is in memory: what one process fires no worker would '
                'find.',
                hint='Name a file.',
                id='celery_triggers.E006',
            )
        )
    mode = str(found['OPTIONS'].get('transaction_mode', 'DEFERRED')).upper()
    if connections[alias].vendor == 'sqlite' and VERSION >= (5, 1) and mode == 'DEFERRED':
        messages.append(
            checks.Warning(
                f'The transactions of the SQLite database {alias!r} begin without its lock: one '
                'that reads and then fires fails at once ("database is locked") if another '
                'process has written in between.',
                hint="Set OPTIONS to {'transaction_mode': 'IMMEDIATE'}.",
                id='celery_triggers.W006',
            )
        )
    level = found['OPTIONS'].get('isolation_level', 'read committed')
    if connections[alias].vendor == 'mysql' and level != 'read committed':
        messages.append(
            checks.Warning(
                f'The isolation level of the database {alias!r} is {level!r}: a change of a '
                'session within transaction.atomic() may be decided on what was there when '
                'the transaction began, and never be accepted.',
                hint="Leave it at Django's default, 'read committed'.",
                id='celery_triggers.W004',
            )
        )
    return messages


@register(TAG, deploy=True)
def check_deployment(**_: Any) -> list[CheckMessage]:
    """Check what only ``check --deploy`` does: it imports the modules of Celery's tasks."""
    services = project_services()
    if services is None:
        return []
    messages: list[CheckMessage] = []
    try:
        services.configuration_for('')
    except TriggersError as exc:
        messages.append(
            Error(f'The trigger tasks are not usable: {exc}', id='celery_triggers.E007')
        )
    storage = chosen_storage()
    if storage is not None and connections[storage.alias].vendor == 'sqlite':
        messages.append(
            checks.Warning(
                'The sessions of trigger tasks are kept in an SQLite database: it has one '
                'writer at a time, and is on one host.',
                hint='Keep them in PostgreSQL, MariaDB or MySQL.',
                id='celery_triggers.W005',
            )
        )
    return messages
