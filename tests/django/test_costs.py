"""What each operation costs: the statements are counted, beside BEGIN and COMMIT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from celery_triggers.manager import TriggerManager
from celery_triggers.manager.follow_up import make_change
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.conformance.test_slices import TASKS, cost_among
from celery_triggers.testing.media import Medium


@contextmanager
def statements(alias: str) -> Iterator[list[str]]:
    """Note the statements that are executed, by their first words."""
    from django.db import connections

    sent: list[str] = []

    def note(execute: Any, sql: str, *args: Any) -> Any:
        words = sql.lstrip('(').split()
        sent.append('SET' if 'set_config' in sql else words[0])
        return execute(sql, *args)

    with connections[alias].execute_wrapper(note):
        yield sent
    sent[:] = [word for word in sent if word not in ('BEGIN', 'COMMIT')]


@pytest.fixture
def began(alias: str) -> list[str]:
    """What our own transactions begin with if they write: timeouts, SQLite's only lock."""
    return {'postgresql': ['SET'], 'sqlite': ['UPDATE'], 'mariadb': []}[alias]


@pytest.fixture
def manager(medium: Medium) -> TriggerManager:
    """A manager of a session that exists."""
    manager = medium.manager(TASKS)
    manager.fire('a')
    manager.fire('nothing')
    # Configurations stay in memory.
    manager.storage.load()
    return manager


def test_a_read_is_one_statement(manager: TriggerManager, alias: str):
    with statements(alias) as sent:
        manager.storage.load()
    assert sent == ['SELECT']


def test_a_session_that_does_not_exist_costs_the_clock(medium: Medium, alias: str):
    manager = medium.manager(TASKS, 'order:new')
    with statements(alias) as sent:
        assert not manager.storage.exists
    assert sent == ['SELECT', 'SELECT']


def test_a_firing_that_releases_nothing(manager: TriggerManager, alias: str, began: list[str]):
    with statements(alias) as sent:
        manager.fire('a')
    # The session; the latest kwargs and the history; the made-up event id.
    assert sent == ['SELECT', *began, 'UPDATE', 'INSERT', 'INSERT']


def test_a_firing_that_releases(manager: TriggerManager, alias: str, began: list[str]):
    with statements(alias) as sent:
        manager.fire('b')
    # Beside the above: the row of the instance, that it waits no more, its due date.
    assert sent == [
        'SELECT', *began, 'UPDATE', 'UPDATE', 'INSERT', 'DELETE', 'INSERT', 'INSERT',
    ]


def test_a_firing_into_a_new_session(medium: Medium, alias: str, began: list[str]):
    medium.manager(TASKS).fire('nothing')
    manager = medium.manager(TASKS, 'order:new')
    with statements(alias) as sent:
        manager.fire('nothing')
    # The configuration is offered; it is there.
    assert sent == ['SELECT', 'SELECT', *began, 'INSERT', 'INSERT', 'INSERT', 'INSERT']


def test_a_claim_and_an_outcome(manager: TriggerManager, alias: str, began: list[str]):
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    with statements(alias) as sent:
        assert run.claim()
    # The row is locked and written, and its due date.
    assert sent == [*began, 'SELECT', 'UPDATE', 'INSERT']
    with statements(alias) as sent:
        assert run.finish({'n': 1})
    assert sent == [
        'SELECT',
        # The session, its row, the row of what it releases, entries, the event id.
        *began, 'UPDATE', 'INSERT', 'UPDATE', 'INSERT', 'INSERT',
        # The due date of the one that ended goes, that of the released one comes.
        'DELETE', 'INSERT',
    ]


def test_a_firing_within_a_transaction(manager: TriggerManager, alias: str, began: list[str]):
    from django.db import transaction

    with transaction.atomic(alias):
        with statements(alias) as sent:
            manager.fire('a')
        # The time and the firing, and the session is not touched.
        assert sent == ['SELECT', 'INSERT']
        outer = statements(alias)
        sent = outer.__enter__()
    outer.__exit__(None, None, None)
    # It is found, applied, and forgotten.
    assert sent == [
        'SELECT', 'SELECT', *began, 'UPDATE', 'INSERT', *began, 'DELETE',
    ]


def test_an_idle_sweep(manager: TriggerManager, medium: Medium, alias: str, began: list[str]):
    storage = manager.storage

    def take(gap: int) -> Any:
        return storage.take_due(medium.url, storage.settings, limit=100, push=1, gap=gap)

    take(60_000)
    with statements(alias) as sent:
        assert take(60_000).entries == []
    # The dates alone, for as long as nobody needs to know that somebody looks at them.
    assert sent == ['SELECT']
    with statements(alias) as sent:
        assert take(1).entries == []
    assert sent == [*began, 'SELECT', 'INSERT', 'DELETE', 'SELECT', 'SELECT', 'SELECT']


@pytest.mark.parametrize('finalizing', [False, True])
def test_the_statements_never_grow_with_the_session(
    medium: Medium, alias: str, finalizing: bool
):
    """800 instances that wait for something else cost a firing nothing."""
    costs = []
    for size in (2, 800):
        manager = medium.manager(TASKS, f'order:{size}', finalizing=finalizing)
        costs.append(cost_among(manager, size, partial(statements, alias)))
    assert costs[0] == costs[1]


def test_many_rows_are_written_by_two_statements(
    medium: Medium, alias: str, began: list[str]
):
    """A firing that releases a thousand instances is no thousand statements."""
    manager = medium.manager({'t_many': {'andEvery': 'item', 'after': ['go'], 'run': 'x'}})
    fill_only(manager, 500)
    with statements(alias) as sent:
        assert len(manager.fire('go').released) == 500
    # In SQLite a statement holds about a thousand values.
    most = 60 if alias == 'sqlite' else 12
    assert len(sent) <= most, sent


def fill_only(manager: TriggerManager, size: int) -> None:
    from celery_triggers.engine import plans

    def decide(step: Any) -> None:
        for number in range(size):
            step.fire('item', {'n': number})

    make_change(manager, plans.firing('item'), decide)
