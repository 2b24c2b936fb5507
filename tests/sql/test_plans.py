"""What the planners make of the statements: none reads a table, and none a whole session.

The statements are those that the operations really execute, among sessions enough for a
planner to take it seriously: 100,000 in PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.manager.delivery import Delivery
from celery_triggers.storages.records import Write
from celery_triggers.storages.relational.backend import UIDS_AT_ONCE
from celery_triggers.storages.sql.database import SQLDatabase
from celery_triggers.testing.conformance.support import application_of, delivery
from celery_triggers.testing.media import Medium
from tests.sql.conftest import SQL, drop, opened
from tests.sql.crowd import fill
from tests.sql.places import database_of, engine_of, executed, one_connection, sweep

#: How many sessions there are: fewer where the planner does not care.
SIZES = {'sql-postgresql': 100_000, 'sql-mariadb': 10_000, 'sql-sqlite': 1000}

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x', 'within': 1000},
    't_next': {'after': ['t_join'], 'run': 'x'},
    't_late': {'after': ['late'], 'unless': ['a'], 'run': 'x', 'within': 1000},
    't_many': {'andEvery': 'item', 'after': ['never'], 'run': 'x'},
}


@pytest.fixture(scope='module', params=SQL, ids=lambda medium: medium.name)
def crowd(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Medium]:
    """A database with very many sessions."""
    medium = opened(request.param, tmp_path_factory.mktemp('crowd'))
    try:
        database = database_of(medium.manager(TASKS))
        database.known_place()
        fill(database.engine, database.tables, SIZES[medium.name])
        yield medium
    finally:
        drop(medium)


# -------------------------------------------------------------------------- operations


class Operation:
    """An operation on a session of its own: it is prepared, and then it is looked at.

    Attributes:
        before: The manager that prepares.
        manager: The one that is looked at; it has a connection of its own.
        outside: An application's engine.
    """

    def __init__(self, medium: Medium, name: str):
        self.medium = medium
        self.before = medium.manager(TASKS, f'op:{name}')
        # Prepared at once, as statements are that a process executes often.
        options = {'connect_args': {'prepare_threshold': 0}} if _is_postgresql(medium) else {}
        self.manager = medium.manager(TASKS, f'op:{name}', **one_connection(**options))
        self.database = database_of(self.manager)
        self.outside = engine_of(medium)

    def close(self) -> None:
        self.outside.dispose()
        self.database.engine.dispose()

    def fire(self, *triggers: str) -> None:
        for trigger in triggers:
            self.before.fire(trigger)

    def released(self) -> Delivery:
        """Return the delivery of an instance that was released."""
        self.fire('a', 'b')
        return Delivery(self.manager, delivery(self.before, 't_join#0').header, 'token')

    def claimed(self) -> Delivery:
        run = self.released()
        assert run.claim()
        return run

    def make_due(self) -> None:
        """Let all that this session waits for be due, and nobody have swept for long."""
        tables, uid = self.database.tables, self.manager.uid
        with self.outside.begin() as connection:
            connection.execute(sa.update(tables.dues).where(tables.dues.c.uid == uid).values(at=1))
            connection.execute(sa.update(tables.sweeps).values(taken_at=1))

    def store(self, *, apply: bool) -> None:
        """Fire within a transaction of an application's."""
        with self.outside.connect() as connection:
            self.manager.fire('a', connection=connection)
            if apply:
                connection.commit()

    def confirm(self) -> None:
        release = application_of(self.before).releases[-1]
        written, _ = self.manager.storage.write(release.confirm_write())
        assert written

    def write_to_nobody(self) -> None:
        write = Write('t_join#0', 'another incarnation', [{}], {}, 0)
        assert self.manager.storage.write(write) == (False, None)

    def sweep_and_note(self) -> None:
        self.database.noted_at = None
        sweep(self.manager)

    def look_gates_up(self) -> None:
        storage = self.manager.storage
        storage.gates(storage.url, storage.settings, ['one', 'other'])

    def look_at_uids(self) -> None:
        storage = self.manager.storage
        next(iter(storage.uids(storage.url, storage.settings)))


def _is_postgresql(medium: Medium) -> bool:
    return medium.name == 'sql-postgresql'


def _nothing(operation: Operation) -> Any:
    return None


#: What is prepared, and then what is looked at.
OPERATIONS: dict[str, tuple[Callable[[Operation], Any], Callable[[Operation, Any], Any]]] = {
    'a firing that releases nothing': (lambda o: o.fire('a'), lambda o, _: o.manager.fire('a')),
    'a firing that releases': (lambda o: o.fire('a'), lambda o, _: o.manager.fire('b')),
    'a firing that abandons': (lambda o: o.fire('x'), lambda o, _: o.manager.fire('a')),
    'a firing that creates': (lambda o: o.fire('a'), lambda o, _: o.manager.fire('item')),
    'a firing with an event id': (
        lambda o: o.fire('a'), lambda o, _: o.manager.fire('a', event_id='e')
    ),
    'a firing into a new session': (_nothing, lambda o, _: o.manager.fire('a')),
    'a claim': (lambda o: o.released(), lambda o, run: run.claim()),
    'an outcome': (lambda o: o.claimed(), lambda o, run: run.finish({'n': 1})),
    'a confirm': (lambda o: o.fire('a', 'b'), lambda o, _: o.confirm()),
    'a write to nobody': (lambda o: o.fire('x'), lambda o, _: o.write_to_nobody()),
    'an idle sweep': (lambda o: o.sweep_and_note(), lambda o, _: sweep(o.manager)),
    'an idle sweep that is noted': (
        lambda o: o.sweep_and_note(), lambda o, _: o.sweep_and_note()
    ),
    'a sweep that takes': (
        lambda o: o.fire('a', 'b') or o.make_due(), lambda o, _: o.sweep_and_note()
    ),
    'looking gates up': (_nothing, lambda o, _: o.look_gates_up()),
    'a stored firing': (lambda o: o.fire('x'), lambda o, _: o.store(apply=False)),
    'a stored firing that is applied': (lambda o: o.fire('x'), lambda o, _: o.store(apply=True)),
    'a configuration': (lambda o: o.fire('x'), lambda o, _: o.manager.storage._configuration('x')),
    'the whole session': (lambda o: o.fire('a', 'b'), lambda o, _: o.manager.storage.load()),
    'cancelling a session': (lambda o: o.fire('a', 'b', 'item'), lambda o, _: o.manager.cancel()),
    'deleting a session': (
        lambda o: o.fire('a', 'b'), lambda o, _: o.manager.storage.delete()
    ),
    'a page of uids': (_nothing, lambda o, _: o.look_at_uids()),
}

#: Those that may read all that a session has.
WHOLE = {'the whole session', 'cancelling a session', 'deleting a session'}


@pytest.mark.parametrize('name', OPERATIONS)
def test_no_statement_reads_a_table(crowd: Medium, name: str):
    operation = Operation(crowd, name)
    prepare, run = OPERATIONS[name]
    prepared = prepare(operation)
    with executed(operation.database.engine, operation.outside) as statements:
        run(operation, prepared)
    assert statements
    with operation.database.engine.connect() as connection:
        planner = PLANNERS[crowd.name](operation.database, connection)
        for statement, parameters in statements:
            assert planner.reads(statement, parameters) == [], statement
            if name not in WHOLE:
                assert planner.reads_session(statement, parameters) == [], statement
        if isinstance(planner, PostgreSQLPlanner):
            assert planner.check_prepared(whole=name in WHOLE) or name == 'a stored firing'
    operation.close()


# ----------------------------------------------------------------------------- planners


class Planner:
    """Asks the database for its plans."""

    #: The tables whose keys have two columns, with the second one.
    KEYS = {'entries': 'eid', 'instances': 'iid', 'waiting': 'tid', 'passing': 'eid', 'dues': 'iid'}
    #: The tables that have one row.
    SMALL = ('sweeps', 'schema')

    def __init__(self, database: SQLDatabase, connection: sa.Connection):
        self.connection = connection
        self.prefix = database.prefix
        self.names = {
            str(table.name): str(table.name).removeprefix(f'{database.prefix}_')
            for table in database.tables.metadata.tables.values()
        }

    def reads(self, statement: str, parameters: Any) -> list[Any]:
        """Return where a statement reads a table or an index from one end to the other."""
        raise NotImplementedError

    def reads_session(self, statement: str, parameters: Any) -> list[Any]:
        """Return where it looks at everything that a session has in a table."""
        raise NotImplementedError


class PostgreSQLPlanner(Planner):
    def reads(self, statement: str, parameters: Any) -> list[Any]:
        return self._reading(self._explained(statement, parameters))

    def reads_session(self, statement: str, parameters: Any) -> list[Any]:
        return self._reading_session(self._explained(statement, parameters))

    def check_prepared(self, *, whole: bool) -> int:
        """Check the plans that are made once for any parameters, which the server may choose.

        Returns:
            How many there are.
        """
        self.connection.exec_driver_sql('SET plan_cache_mode = force_generic_plan')
        prepared = self.connection.exec_driver_sql(
            'SELECT name, statement, cardinality(parameter_types)'
            ' FROM pg_prepared_statements WHERE statement LIKE %s AND statement NOT LIKE %s',
            (f'%{self.prefix}_%', 'EXPLAIN%'),
        ).all()
        for name, statement, count in prepared:
            arguments = f'({", ".join(["NULL"] * count)})' if count else ''
            plan = self._plan(f'EXECUTE "{name}"{arguments}')
            assert self._reading(plan) == [], statement
            assert whole or self._reading_session(plan) == [], statement
        self.connection.exec_driver_sql('RESET plan_cache_mode')
        return len(prepared)

    def _explained(self, statement: str, parameters: Any) -> dict[str, Any]:
        if not any(name in statement for name in self.names):
            return {}
        return self._plan(statement, parameters)

    def _plan(self, statement: str, parameters: Any = None) -> dict[str, Any]:
        asked = f'EXPLAIN (FORMAT JSON) {statement}'
        found = self.connection.exec_driver_sql(asked, parameters).scalar_one()
        return dict(found[0]['Plan'])

    def _nodes(self, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if plan:
            yield plan
        for part in plan.get('Plans', []):
            yield from self._nodes(part)

    def _reading(self, plan: dict[str, Any]) -> list[Any]:
        return [
            node
            for node in self._nodes(plan)
            if self.names.get(node.get('Relation Name', '')) not in self.SMALL
            and (node['Node Type'] == 'Seq Scan' or self._is_unbounded(node))
        ]

    @staticmethod
    def _is_unbounded(node: dict[str, Any]) -> bool:
        kinds = ('Index Scan', 'Index Only Scan', 'Bitmap Index Scan')
        return node['Node Type'] in kinds and 'Index Cond' not in node

    def _reading_session(self, plan: dict[str, Any]) -> list[Any]:
        return [
            node
            for node in self._nodes(plan)
            for table, name in self.names.items()
            if node.get('Index Name') == f'{table}_pkey'
            and self.KEYS.get(name, '') not in node.get('Index Cond', '')
        ]


class MariaDBPlanner(Planner):
    def reads(self, statement: str, parameters: Any) -> list[Any]:
        return [
            row
            for row in self._rows(statement, parameters)
            if row['type'] in ('ALL', 'index')
            and self.names.get(row['table'], 'schema') not in self.SMALL
        ]

    def reads_session(self, statement: str, parameters: Any) -> list[Any]:
        # A column of a key has 32 characters of 4 bytes, and a length.
        return [
            row
            for row in self._rows(statement, parameters)
            if self.names.get(row['table']) in self.KEYS
            and row['key'] == 'PRIMARY' and int(row['key_len']) < 2 * 130
        ]

    def _rows(self, statement: str, parameters: Any) -> list[Any]:
        # An INSERT of values looks for nothing but the keys of its rows.
        ours = any(name in statement for name in self.names)
        if not ours or statement.startswith(('INSERT', 'DESCRIBE')):
            return []
        asked = self.connection.exec_driver_sql(f'EXPLAIN {statement}', parameters)
        return list(asked.mappings())


class SQLitePlanner(Planner):
    def reads(self, statement: str, parameters: Any) -> list[Any]:
        return [
            line
            for line in self._lines(statement, parameters)
            for table, name in self.names.items()
            if line.startswith(f'SCAN {table}') and name not in self.SMALL
        ]

    def reads_session(self, statement: str, parameters: Any) -> list[Any]:
        return [
            line
            for line in self._lines(statement, parameters)
            for table, name in self.names.items()
            if f'autoindex_{table}_' in line and f'{self.KEYS.get(name, "")}' not in line
        ]

    def _lines(self, statement: str, parameters: Any) -> list[str]:
        if statement.startswith(('BEGIN', 'PRAGMA')):
            return []
        asked = self.connection.exec_driver_sql(f'EXPLAIN QUERY PLAN {statement}', parameters)
        return [row[3] for row in asked]


PLANNERS = {
    'sql-postgresql': PostgreSQLPlanner, 'sql-mariadb': MariaDBPlanner, 'sql-sqlite': SQLitePlanner,
}


def test_what_reads_a_table_is_found_out(crowd: Medium):
    operation = Operation(crowd, 'check')
    dues = operation.database.tables.dues
    entries = operation.database.tables.entries
    with executed(operation.database.engine) as statements:
        with operation.database.engine.connect() as connection:
            connection.execute(sa.select(dues.c.uid).where(dues.c.name == 'x'))
            connection.execute(sa.select(entries.c.value).where(entries.c.sid == 'x'))
    with operation.database.engine.connect() as connection:
        planner = PLANNERS[crowd.name](operation.database, connection)
        assert planner.reads(*statements[0])
        assert planner.reads_session(*statements[1])
    operation.close()


# ------------------------------------------------------------------------------- uids


def test_uids_are_read_page_by_page(crowd: Medium):
    """What is held of them is one page."""
    storage = crowd.backend()
    size = SIZES[crowd.name]
    with executed(database_of(crowd.manager(TASKS)).engine) as statements:
        uids = storage.uids(storage.url, storage.settings, 'crowd:')
        found = {next(uids) for _ in range(UIDS_AT_ONCE // 2)}
        assert len(statements) == 1
        found.update(uids)
        assert len(found) == size
        assert len(statements) == size // UIDS_AT_ONCE + 1
        assert crowd.uids('nothing like that') == []
