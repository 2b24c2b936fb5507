"""What others have locked: it is waited for, not for ever, and nobody is told of deadlocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.relational.backend import key
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium
from tests.parts.waiting import eventually
from tests.sql.places import (
    ONE,
    SHORT,
    Sessions,
    connected,
    database_of,
    executed,
    one_connection,
    sweep,
)

TASKS: dict[str, Any] = {
    't_each': {'andEvery': 'a', 'run': 'x'},
    't_join': {'after': ['b'], 'run': 'x', 'within': 1000},
}


@contextmanager
def locked(medium: Medium, manager: TriggerManager, what: str) -> Iterator[None]:
    """Lock a session's row, or its table, as another program."""
    table = database_of(manager).tables.sessions
    with connected(medium) as other:
        name = other.dialect.identifier_preparer.format_table(table)
        kind = other.dialect.name
        if kind == 'sqlite':
            other.exec_driver_sql('BEGIN IMMEDIATE')
        elif what == 'row':
            row = sa.select(table).where(table.c.sid == key(manager.uid)).with_for_update()
            assert other.execute(row).one()
        elif kind == 'postgresql':
            other.exec_driver_sql(f'LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE')
        else:
            other.exec_driver_sql(f'LOCK TABLES {name} WRITE')
        yield


@pytest.fixture
def hasty(medium: Medium) -> TriggerManager:
    """A manager that waits for a lock for a moment only, and its session."""
    manager = medium.manager(TASKS, triggers_storage_options=SHORT)
    manager.fire('b')
    return manager


@pytest.mark.parametrize('what', ['row', 'table'])
@pytest.mark.parametrize('event_id', [None, 'e'])
def test_a_firing_into_what_somebody_else_has_locked(
    medium: Medium, hasty: TriggerManager, what: str, event_id: str | None
):
    with locked(medium, hasty, what):
        with pytest.raises(StorageUnavailable) as caught:
            hasty.fire('a', event_id=event_id)
    error = caught.value
    assert not error.outcome_unknown
    assert error.event_id
    assert event_id in (None, error.event_id)
    assert fired(hasty) == ['b']
    assert not hasty.fire('a', event_id=error.event_id).duplicate
    assert hasty.fire('a', event_id=error.event_id).duplicate
    assert statuses(hasty) == {'t_each#0': 'scheduled', 't_join#0': 'scheduled'}


def test_a_locked_session_can_be_read(medium: Medium, hasty: TriggerManager):
    with locked(medium, hasty, 'row'):
        assert statuses(hasty) == {'t_join#0': 'scheduled'}
        # SQLite has one lock for all.
        assert medium.name == 'sql-sqlite' or sweep(hasty).taken == 0


def test_a_claim_of_a_locked_instance(medium: Medium, hasty: TriggerManager):
    run = delivery(hasty, 't_join#0')
    instances = database_of(hasty).tables.instances
    with connected(medium) as other:
        if other.dialect.name == 'sqlite':
            other.exec_driver_sql('BEGIN IMMEDIATE')
        else:
            other.execute(sa.select(instances).with_for_update()).one()
        with pytest.raises(StorageUnavailable) as caught:
            run.claim()
    assert not caught.value.outcome_unknown
    assert run.claim()


def test_a_session_that_is_being_made_is_waited_for(server: Medium):
    """Two firings begin a session; the one that comes second decides again."""
    manager = server.manager(TASKS)
    database = database_of(manager)
    database.known_place()
    with connected(server) as other, working() as pool:
        values = {'sid': key(manager.uid), 'uid': manager.uid, 'version': 'v', 'head': ''}
        other.execute(sa.insert(database.tables.sessions), {**values, 'incarnation': 'i'})
        with executed(database.engine) as statements:
            firing = pool.submit(manager.fire, 'a')
            eventually(lambda: any(s.startswith('INSERT') for s, _ in statements))
            other.rollback()
            assert firing.result().released == ['t_each#0']


def test_a_sweep_leaves_what_somebody_else_is_taking(server: Medium):
    manager = server.manager(TASKS, triggers_storage_options=SHORT)
    manager.fire('b')
    server.manager(TASKS, 'order:2').fire('b')
    dues = database_of(manager).tables.dues
    with connected(server) as other:
        other.execute(sa.update(dues).values(at=1))
        other.commit()
        theirs = sa.select(dues).where(dues.c.sid == key(manager.uid)).with_for_update()
        other.execute(theirs).one()
        storage = manager.storage
        taken = storage.take_due(storage.url, storage.settings, limit=10, push=1000, gap=30_000)
    assert [due.uid for due in taken.entries] == ['order:2']


# -------------------------------------------------------------------------- timeouts


def timeouts_of(manager: TriggerManager) -> list[str]:
    """Return what the server knows of a storage's connection: lock, statement, idle."""
    engine = database_of(manager).engine
    with engine.connect() as connection:
        if engine.dialect.name == 'postgresql':
            names = ('lock_timeout', 'statement_timeout', 'idle_in_transaction_session_timeout')
            shown = [connection.exec_driver_sql(f'SHOW {name}').scalar_one() for name in names]
        else:
            names = ('innodb_lock_wait_timeout', 'lock_wait_timeout', 'idle_transaction_timeout')
            asked = ', '.join(f'@@{name}' for name in names)
            shown = list(connection.exec_driver_sql(f'SELECT {asked}').one())
    return [str(value) for value in shown]


@pytest.mark.parametrize(
    ('options', 'postgresql', 'mariadb'),
    [
        ({}, ['10s', '30s', '30s'], ['10', '10', '30']),
        ({'lock_timeout': 0.5}, ['500ms', '30s', '30s'], ['1', '1', '30']),
        (
            {'lock_timeout': 3, 'statement_timeout': 1.5},
            ['3s', '1500ms', '1500ms'], ['3', '3', '2'],
        ),
    ],
)
def test_every_connection_has_its_timeouts(
    server: Medium, options: dict[str, Any], postgresql: list[str], mariadb: list[str]
):
    manager = server.manager(TASKS, triggers_storage_options=options)
    wanted = postgresql if server.name == 'sql-postgresql' else mariadb
    assert timeouts_of(manager) == wanted


@pytest.mark.parametrize('option', ['lock_timeout', 'statement_timeout'])
@pytest.mark.parametrize('seconds', [0, -1, '10', True])
def test_a_timeout_that_is_none(medium: Medium, option: str, seconds: Any):
    with pytest.raises(StorageNotConfigured, match=option):
        medium.manager(TASKS, triggers_storage_options={option: seconds})


def test_a_pool_that_is_exhausted_is_an_unavailable_storage(medium: Medium):
    manager = medium.manager(TASKS, **one_connection(pool_timeout=0.05))
    manager.fire('a')
    with database_of(manager).engine.connect():
        with pytest.raises(StorageUnavailable, match='QueuePool') as caught:
            manager.fire('a', event_id='e')
    assert not caught.value.outcome_unknown
    assert not manager.fire('a', event_id='e').duplicate


# ---------------------------------------------------- deadlocks, serialization failures


@contextmanager
def working() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@contextmanager
def errors(engine: sa.Engine) -> Iterator[list[Any]]:
    """Note the errors of the database: SQLSTATE, or the number that MariaDB gives."""
    found: list[Any] = []

    def note(context: Any) -> None:
        error = context.original_exception
        number = error.args[0]
        found.append(number if isinstance(number, int) else error.sqlstate)

    sa.event.listen(engine, 'handle_error', note)
    try:
        yield found
    finally:
        sa.event.remove(engine, 'handle_error', note)


def test_a_deadlock_is_nobodys_business(server: Medium):
    """The storage has the session and wants its due date; another has that, and wants the first."""
    manager = server.manager(TASKS)
    manager.fire('x')
    tables = database_of(manager).tables
    sid, engine = key(manager.uid), database_of(manager).engine
    session = sa.select(tables.sessions).where(tables.sessions.c.sid == sid).with_for_update()
    due = sa.select(tables.dues).where(tables.dues.c.sid == sid).with_for_update()
    with connected(server) as other, executed(engine) as statements, errors(engine) as found:
        be_the_stronger(other, tables.configurations)
        other.execute(due).one()
        with working() as pool:
            firing = pool.submit(manager.fire, 'b', event_id='e')
            eventually(lambda: any('_dues' in statement for statement, _ in statements))
            other.execute(session).one()
            eventually(lambda: found)
            other.rollback()
            assert firing.result().released == ['t_join#0']
    assert found == ['40P01' if server.name == 'sql-postgresql' else 1213]
    assert fired(manager) == ['x', 'b']


def be_the_stronger(connection: sa.Connection, table: sa.Table) -> None:
    """Let the other transaction of a deadlock be the one that is undone."""
    if connection.dialect.name == 'postgresql':
        # Who finds it out first gives way.
        connection.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")
    else:
        # Who has written less does.
        rows = [{'digest': f'{number}', 'text': ''} for number in range(100)]
        connection.execute(sa.insert(table), rows)


@pytest.mark.parametrize('isolation', [None, 'REPEATABLE READ', 'SERIALIZABLE'])
def test_serialization_failures_are_nobodys_business(
    server: Medium, under: Callable[[Medium, str], Medium], isolation: str | None
):
    if server.name != 'sql-postgresql':
        pytest.skip('MariaDB waits, and then reads what the other has written')
    joint = '%20' if '?' in str(server.url) else '?options='
    url = f'{server.url}{joint}-c%20default_transaction_isolation%3Dserializable'
    server = under(server, server.prefix)
    server.url = url
    options = {'isolation_level': isolation} if isolation else {}
    manager = server.manager(TASKS, triggers_storage_options={**ONE, **options})
    manager.fire('x')
    sessions = database_of(manager).tables.sessions
    with connected(server) as other, connected(server) as outside:
        theirs = Sessions(manager, outside)
        id_ = theirs.id()
        other.execute(sa.update(sessions).values(uid=sessions.c.uid))
        with errors(database_of(manager).engine) as found, working() as pool:
            firing = pool.submit(manager.fire, 'b', event_id='e')
            eventually(lambda: theirs.is_waiting(id_))
            other.commit()
            assert firing.result().released == ['t_join#0']
    assert found == (['40001'] if isolation else [])
    assert fired(manager) == ['x', 'b']


def test_a_record_that_has_changed_meanwhile_is_nobodys_business(server: Medium):
    """MariaDB's serialization failure, where it is asked for: usual from 11.6 on."""
    if server.name != 'sql-mariadb':
        pytest.skip('see above')
    with connected(server) as outside:
        known = outside.exec_driver_sql("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'").all()
    if not known:
        pytest.skip('this server knows none')
    snapshots = {'init_command': 'SET innodb_snapshot_isolation = 1'}
    options = {'isolation_level': 'REPEATABLE READ', 'connect_args': snapshots}
    manager = server.manager(TASKS, **one_connection(**options))
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    instances = database_of(manager).tables.instances
    with connected(server) as other, connected(server) as outside:
        theirs = Sessions(manager, outside)
        id_ = theirs.id()
        other.execute(sa.update(instances).values(loss='x'))
        with errors(database_of(manager).engine) as found, working() as pool:
            claimed = pool.submit(run.claim)
            eventually(lambda: theirs.is_waiting(id_))
            other.commit()
            assert claimed.result()
    assert found == [1020]
