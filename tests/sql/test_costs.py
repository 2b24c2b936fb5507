"""What each operation costs: statements, and round trips over the wire.

Statements are those that SQLAlchemy executes. Round trips are counted where they pass, by a
proxy in front of the server: what begins and ends transactions is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.conformance.test_slices import TASKS, cost_among
from celery_triggers.testing.media import Medium
from tests.parts.proxy import DatabaseProxy
from tests.sql.places import database_of, executed, one_connection, sweep


@dataclass
class Cost:
    """What was counted.

    Attributes:
        statements: Their first words, in order.
        trips: Round trips; ``None`` where there is no server.
    """

    statements: list[str] = field(default_factory=list)
    trips: int | None = None


@dataclass
class Place:
    """A database that nobody else uses, and who counts."""

    medium: Medium
    proxy: DatabaseProxy | None

    def manager(
        self, uid: str = 'order:1', *, finalizing: bool = False, **settings: Any
    ) -> TriggerManager:
        # psycopg prepares a statement when it is executed for the sixth time, by one more
        # round trip.
        options = {'prepare_threshold': None} if self.kind == 'postgresql' else {}
        return self.medium.manager(
            TASKS, uid, finalizing=finalizing, **one_connection(connect_args=options), **settings
        )

    @contextmanager
    def counting(self) -> Iterator[Cost]:
        cost = Cost()
        before = self.proxy.trips if self.proxy is not None else 0
        with executed(database_of(self.manager()).engine) as statements:
            yield cost
        cost.statements = [statement.split()[0] for statement, _ in statements]
        if self.proxy is not None:
            cost.trips = self.proxy.trips - before

    @property
    def kind(self) -> str:
        return self.medium.name.removeprefix('sql-')


@pytest.fixture
def place(medium: Medium) -> Iterator[Place]:
    """Each database in turn, with connections that are made and a configuration that is there."""
    if medium.name == 'sql-sqlite':
        yield Place(medium, None)
        return
    with DatabaseProxy(str(medium.url)) as proxy:
        found = Place(replace(medium, url=proxy.through), proxy)
        yield found
        database_of(found.manager()).engine.dispose()


@pytest.fixture
def manager(place: Place) -> TriggerManager:
    """A manager of a session that exists, in a process that knows the configuration."""
    warm(place)
    return place.manager()


def warm(place: Place, *, finalizing: bool = False) -> None:
    for uid in ('order:1', 'order:warm'):
        manager = place.manager(uid, finalizing=finalizing)
        manager.fire('a')
        manager.fire('nothing')


#: A commit of a firing that changes no instance: the session, what is stored of the firing, the
#: made-up event id.
PLAIN = ['UPDATE', 'INSERT', 'INSERT']
#: One that releases, too: the row, that it does not wait any more, its due date.
RELEASING = ['UPDATE', 'UPDATE', 'INSERT', 'DELETE', 'INSERT', 'INSERT']
CREATING = ['UPDATE', 'INSERT', 'INSERT', 'INSERT', 'INSERT']

#: By what is fired: the statements of its commit.
FIRINGS: dict[str, tuple[Callable[[TriggerManager], Any], list[str]]] = {
    'releases nothing': (lambda manager: manager.fire('a'), PLAIN),
    'is heard by nobody': (lambda manager: manager.fire('nothing'), PLAIN),
    'releases': (lambda manager: manager.fire('b'), RELEASING),
    'creates': (lambda manager: manager.fire('item'), CREATING),
    'has an event id': (lambda manager: manager.fire('a', event_id='e'), ['UPDATE', 'INSERT']),
}


def of_commit(place: Place, statements: list[str]) -> Cost:
    """Return what a transaction costs, the beginning and the end included."""
    begins = {'sqlite': ['BEGIN']}.get(place.kind, [])
    # psycopg begins with a round trip; MariaDB's transactions begin by themselves.
    trips = {'postgresql': len(statements) + 2, 'mariadb': len(statements) + 1}.get(place.kind)
    return Cost([*begins, *statements], trips)


def of_read(place: Place, statements: int = 1) -> Cost:
    """Return what a read costs: in PostgreSQL it is no transaction."""
    trips = {'postgresql': statements, 'mariadb': statements + 1}.get(place.kind)
    return Cost(['SELECT'] * statements, trips)


def together(*costs: Cost) -> Cost:
    trips = [cost.trips for cost in costs if cost.trips is not None]
    return Cost([one for cost in costs for one in cost.statements], sum(trips) if trips else None)


@pytest.mark.parametrize('finalizing', [False, True])
@pytest.mark.parametrize('firing', FIRINGS)
def test_a_firing(place: Place, firing: str, finalizing: bool):
    warm(place, finalizing=finalizing)
    fire, statements = FIRINGS[firing]
    manager = place.manager(finalizing=finalizing)
    with place.counting() as cost:
        fire(manager)
    assert cost == together(of_read(place), of_commit(place, statements))


def test_a_firing_into_a_new_session(place: Place, manager: TriggerManager):
    new = place.manager('order:new')
    with place.counting() as cost:
        new.fire('a')
    # The session, its row, entries, who waits, the made-up event id, the configuration.
    assert cost == together(of_read(place), of_commit(place, ['INSERT'] * 6))


def test_a_repeated_event_id(place: Place, manager: TriggerManager):
    manager.fire('a', event_id='e')
    with place.counting() as cost:
        assert manager.fire('a', event_id='e').duplicate
    assert cost == of_read(place)


def test_a_claim(place: Place, manager: TriggerManager):
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    with place.counting() as cost:
        assert run.claim()
    # The row is read and locked, and written; its due date.
    assert cost == of_commit(place, ['SELECT', 'UPDATE', 'INSERT'])


def test_an_outcome_with_a_cascade(place: Place, manager: TriggerManager):
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    run.claim()
    with place.counting() as cost:
        assert run.finish({'n': 1})
    assert statuses(manager)['t_next#0'] == 'scheduled'
    # The session, the new row, the one that ended, entries, the made-up event id, the due date
    # of the one and that of the other.
    commit = ['UPDATE', 'INSERT', 'UPDATE', 'INSERT', 'INSERT', 'DELETE', 'INSERT']
    assert cost == together(of_read(place), of_commit(place, commit))


def test_an_idle_sweep(place: Place, manager: TriggerManager):
    sweep(manager)
    with place.counting() as cost:
        assert sweep(manager).taken == 0
    assert cost == of_read(place)


def test_an_idle_sweep_of_a_process_that_has_not_noted_one(place: Place, manager: TriggerManager):
    sweep(manager)
    database_of(manager).noted_at = None
    with place.counting() as cost:
        assert sweep(manager).taken == 0
    # When somebody swept, what is due, what is in the inbox, when the next is.
    assert cost == of_commit(place, ['SELECT'] * 4)


def test_a_sweep_that_takes_something(place: Place, manager: TriggerManager):
    manager.fire('b')
    database = database_of(manager)
    with database.engine.begin() as connection:
        connection.execute(sa.update(database.tables.dues).values(at=1))
    storage = manager.storage
    with place.counting() as cost:
        taken = storage.take_due(storage.url, storage.settings, limit=10, push=1000, gap=30_000)
    assert len(taken.entries) == 1
    # As above; the first one notes that it swept and tidies up, and it moves what it takes.
    statements = ['SELECT', 'INSERT', 'DELETE', 'SELECT', 'INSERT', 'SELECT', 'SELECT']
    assert cost == of_commit(place, statements)


def test_a_sweep_that_takes_very_much(place: Place, manager: TriggerManager):
    """What one takes is moved at once, and not row by row."""
    if place.proxy is None:
        pytest.skip('there are no round trips')
    database = database_of(manager)
    dues = [
        {'sid': f'{number}', 'iid': 'i', 'uid': 'order:1', 'name': 't_join#0', 'at': 1}
        for number in range(500)
    ]
    with database.engine.begin() as connection:
        connection.execute(sa.insert(database.tables.dues), dues)
    storage = manager.storage
    with place.counting() as cost:
        taken = storage.take_due(storage.url, storage.settings, limit=1000, push=1000, gap=30_000)
    assert len(taken.entries) == 500
    assert cost.trips is not None
    assert cost.trips < 50


def test_looking_gates_up(place: Place, manager: TriggerManager):
    storage = manager.storage
    with place.counting() as cost:
        storage.gates(storage.url, storage.settings, ['one', 'other'])
    assert cost == of_read(place)


@pytest.mark.parametrize('finalizing', [False, True])
def test_the_cost_never_grows_with_the_session(place: Place, finalizing: bool):
    """2,000 instances that wait for something else cost a firing nothing."""
    costs = []
    for size in (2, 2000):
        # So that each drops what is too old.
        settings = {'triggers_history_limit': 1}
        manager = place.manager(f'order:{size}', finalizing=finalizing, **settings)
        costs.append(cost_among(manager, size, place.counting))
    assert costs[0] == costs[1]
