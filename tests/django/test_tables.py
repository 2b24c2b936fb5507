"""The models and their migrations, on every database."""

from __future__ import annotations

from io import StringIO

import pytest

from celery_triggers.testing.media import Medium
from tests.django.conftest import TASKS


def test_the_migrations_make_what_the_models_say(sqlite: str):
    from django.core.management import call_command

    out = StringIO()
    call_command('makemigrations', 'celery_triggers', check=True, dry_run=True, stdout=out)
    assert 'No changes detected' in out.getvalue()


def test_the_tables_can_be_made_and_taken_away(alias: str):
    from django.apps import apps
    from django.core.management import call_command
    from django.db import connections

    tables = {model._meta.db_table for model in apps.get_app_config('celery_triggers').get_models()}
    assert len(tables) == 10
    try:
        call_command('migrate', 'celery_triggers', 'zero', database=alias, verbosity=0)
        assert not tables.intersection(connections[alias].introspection.table_names())
    finally:
        call_command('migrate', 'celery_triggers', database=alias, verbosity=0)
    assert tables.issubset(connections[alias].introspection.table_names())


def test_the_models_pass_the_checks_of_their_database(alias: str):
    from django.apps import apps
    from django.core.checks import run_checks

    config = apps.get_app_config('celery_triggers')
    assert [m for m in run_checks([config], databases=[alias]) if m.id[:6] == 'models'] == []


def test_postgresql_has_no_second_indexes_for_like(postgresql: str):
    from django.db import connections

    with connections[postgresql].cursor() as cursor:
        cursor.execute(
            "SELECT indexname FROM pg_indexes WHERE tablename LIKE 'celery_triggers_%'"
            " AND schemaname = current_schema()"
        )
        names = [name for (name,) in cursor.fetchall()]
    assert len(names) == 23
    assert [name for name in names if name.endswith('_like')] == []


@pytest.mark.parametrize('prefix', [
    'order:4', 'o', 'x' * 120, 'ORDER', '☃', 'a%', 'z', 'a', '\ud7ff', 'a\U0010ffff', '\U0010ffff',
])
def test_sessions_are_found_by_the_beginning_of_their_uids(medium: Medium, prefix: str):
    uids = [
        'order:4', 'order:42', 'order:5', 'ORDER:4', 'x' * 120, 'x' * 119 + 'y', '☃ snow',
        'a%b', 'aXb', 'a\U0010ffff', 'a\U0010ffffb', 'z\x00', 'z', '\ud7ffx', '\U0010ffff',
    ]
    for uid in uids:
        medium.manager(TASKS, uid).start()
    assert sorted(medium.uids(prefix)) == sorted(uid for uid in uids if uid.startswith(prefix))
