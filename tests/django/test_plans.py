"""What PostgreSQL's planner makes of the ORM's statements, among 100,000 sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium
from tests.django import databases
from tests.django.conftest import TASKS
from tests.sql.crowd import fill

SIZE = 100_000
PREFIX = 'crowd'
#: What is read from one end to the other: it has one row for each prefix.
SMALL = 'celery_triggers_sweep'

#: The tables under the names that the storage ``sql`` gives them.
TABLES = {
    'sessions': 'session', 'entries': 'entry', 'instances': 'instance', 'waiting': 'waiting',
    'passing': 'passing', 'configurations': 'configuration', 'dues': 'due', 'gates': 'gate',
    'inbox': 'inbox',
}


@pytest.fixture
def crowd(postgresql: str) -> Iterator[Medium]:
    """A database with very many sessions, all of one prefix."""
    from django.db import connections

    settings = connections[postgresql].settings_dict
    engine = sa.create_engine(sa.URL.create(
        'postgresql+psycopg', settings['USER'], settings['PASSWORD'] or None, settings['HOST'],
        int(settings['PORT']), settings['NAME'], {'options': settings['OPTIONS']['options']},
    ))
    known = sa.MetaData()
    known.reflect(engine)
    found = {name: known.tables[f'celery_triggers_{model}'] for name, model in TABLES.items()}
    try:
        fill(engine, SimpleNamespace(**found), SIZE, PREFIX)
        yield Medium('django', f'django://{postgresql}', prefix=PREFIX)
    finally:
        with engine.begin() as connection:
            for table in found.values():
                connection.execute(sa.text(f'TRUNCATE "{table.name}"'))
                connection.execute(sa.text(f'ALTER TABLE "{table.name}" SET LOGGED'))
                connection.execute(sa.text(f'ANALYZE "{table.name}"'))
        engine.dispose()
        databases.clear(postgresql)


@contextmanager
def executed() -> Iterator[list[tuple[str, Any]]]:
    """Note the statements on our tables, with their parameters."""
    from django.db import connections

    found: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, params: Any, *args: Any) -> Any:
        if 'celery_triggers_' in sql:
            found.append((sql, params))
        return execute(sql, params, *args)

    with connections['postgresql'].execute_wrapper(note):
        yield found


def plan_of(sql: str, params: Any = None) -> dict[str, Any]:
    from django.db import connections

    with connections['postgresql'].cursor() as cursor:
        cursor.execute(f'EXPLAIN (FORMAT JSON) {sql}', params)
        (found,) = cursor.fetchone()
    # Django leaves JSON to its fields.
    (plan,) = json.loads(found) if isinstance(found, str) else found
    return dict(plan['Plan'])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get('Plans', []):
        yield from nodes(part)


def reads_a_table(node: dict[str, Any]) -> bool:
    """Tell whether a table is read from one end to the other, or one of its indexes."""
    if node.get('Relation Name') == SMALL:
        return False
    kinds = ('Index Scan', 'Index Only Scan', 'Bitmap Index Scan')
    return node['Node Type'] == 'Seq Scan' or (
        node['Node Type'] in kinds and 'Index Cond' not in node
    )


def test_no_statement_reads_a_table(crowd: Medium):
    """Of firings, a claim, outcomes, sweeps, and of what looks for or removes sessions."""
    from django.db import transaction

    manager = crowd.manager(TASKS)
    manager.fire('nothing')
    with executed() as statements:
        use(crowd, manager)
        with transaction.atomic('postgresql'):
            manager.fire('a')
        manager.storage.delete()
    assert len(statements) > 30
    for sql, params in statements:
        assert not any(map(reads_a_table, nodes(plan_of(sql, params)))), sql


def use(crowd: Medium, manager: TriggerManager) -> None:
    storage = manager.storage
    place = crowd.url, storage.settings
    manager.fire('a', event_id='e')
    manager.fire('item')
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    run.claim()
    run.finish(None)
    for gap in (1, 60_000):
        storage.take_due(*place, limit=100, push=1, gap=gap)
    storage.gates(*place, ['one', 'other'])
    next(iter(storage.uids(*place, 'crowd:42')))
    storage.load()


def test_what_reads_a_table_is_found_out(crowd: Medium):
    plan = plan_of("SELECT * FROM celery_triggers_due WHERE uid = 'x'")
    assert any(map(reads_a_table, nodes(plan)))
