"""The databases of the Django tests: a schema or database of this run's own, migrated once.

Processes that a test starts find the same ones, by the environment.
"""

from __future__ import annotations

import os

from tests import django_settings
from tests.parts.servers import nothing_may_be_missing

_PREPARED = 'TRIGGERS_TEST_DJANGO_PREPARED'

_drops: dict[str, str] = {}


def missing(alias: str) -> str:
    """Return why a database cannot be used, or ``''``."""
    from django.db import Error, connections

    django_settings.set_up()
    if connections[alias].vendor == 'sqlite':
        return ''
    try:
        with connections[alias].temporary_connection():
            return ''
    except Error as exc:
        unknown = connections[alias].vendor == 'mysql' and exc.args[0] == 1049
        return '' if unknown else str(exc)


def prepare(alias: str) -> None:
    """Make a database and its tables, once for this process and those that it starts."""
    django_settings.set_up()
    prepared = os.environ.get(_PREPARED, '').split()
    if alias not in prepared:
        from django.core.management import call_command

        _make(alias)
        call_command('migrate', database=alias, verbosity=0)
        os.environ[_PREPARED] = ' '.join([*prepared, alias])


def clear(alias: str) -> None:
    """Remove all sessions."""
    from django.apps import apps

    for model in apps.get_app_config('celery_triggers').get_models():
        model._default_manager.using(alias).all().delete()


def _make(alias: str) -> None:
    from django.db import connections

    connection = connections[alias]
    name = django_settings.OWN_NAME
    if connection.vendor == 'postgresql':
        _execute(alias, f'CREATE SCHEMA "{name}"')
        _drops[alias] = f'DROP SCHEMA "{name}" CASCADE'
    elif connection.vendor == 'mysql':
        _execute(alias, f'CREATE DATABASE `{name}`')
        _drops[alias] = f'DROP DATABASE `{name}`'


def drop() -> None:
    """Remove what this process has made; called when the tests are over."""
    while _drops:
        _execute(*_drops.popitem())


def _execute(alias: str, statement: str) -> None:
    from django.db import connections

    connection = connections[alias]
    # MySQL's may not be there yet.
    place = connection._nodb_cursor() if connection.vendor == 'mysql' else connection.cursor()
    with place as cursor:
        cursor.execute(statement)


def skipping(alias: str) -> str:
    """Return why tests of a database are skipped, or ``''``.

    Raises:
        RuntimeError: It is missing where nothing may be.
    """
    why = missing(alias)
    if why and nothing_may_be_missing():
        raise RuntimeError(f'CI=true, and there is no {alias}: {why}')
    return why
