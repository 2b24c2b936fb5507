"""What each operation costs: round trips, statements and rows are counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.engine import plans
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.records import Slice
from tests.support import Medium, delivery, statuses

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_next': {'after': ['t_join'], 'run': 'x'},
    't_many': {'andEvery': 'item', 'after': ['never'], 'run': 'x'},
}


@contextmanager
def commands(manager: TriggerManager) -> Iterator[list[str]]:
    """Note the commands that are sent to Redis, each a round trip."""
    client: Any = manager.storage._server.client  # type: ignore[attr-defined]
    real, sent = client.execute_command, []

    def counting(*args: Any, **options: Any) -> Any:
        sent.append(args[0])
        return real(*args, **options)

    client.execute_command = counting
    try:
        yield sent
    finally:
        del client.execute_command


@contextmanager
def statements(manager: TriggerManager) -> Iterator[list[str]]:
    """Note the SQL statements that are executed, by their first word; commits are not."""
    engine = manager.storage._database.engine  # type: ignore[attr-defined]
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement.split()[0])

    sa.event.listen(engine, 'before_cursor_execute', note)
    try:
        yield sent
    finally:
        sa.event.remove(engine, 'before_cursor_execute', note)


@contextmanager
def slices(manager: TriggerManager) -> Iterator[list[Slice]]:
    """Note what is read."""
    storage: Any = manager.storage
    real, found = storage._read, []

    def noting(request: Any) -> Slice:
        found.append(real(request))
        return found[-1]

    storage._read = noting
    try:
        yield found
    finally:
        storage._read = real


def warmed_up(medium: Medium, *, finalizing: bool = False) -> TriggerManager:
    """Return a manager of a session that exists, over a storage that knows its scripts."""
    manager = medium.manager(TASKS, finalizing=finalizing)
    manager.fire('a')
    manager.fire('nothing')
    other = medium.manager(TASKS, 'order:warm')
    other.fire('a')
    other.fire('b')
    run = delivery(other, 't_join#0')
    run.claim()
    run.finish(None)
    return manager


FIRINGS: dict[str, Callable[[TriggerManager], Any]] = {
    'releases nothing': lambda manager: manager.fire('a'),
    'is heard by nobody': lambda manager: manager.fire('nothing'),
    'releases': lambda manager: manager.fire('b'),
    'creates': lambda manager: manager.fire('item'),
    'has an event id': lambda manager: manager.fire('a', event_id='e'),
}


@pytest.mark.parametrize('finalizing', [False, True])
@pytest.mark.parametrize('firing', FIRINGS)
def test_a_firing_in_a_known_session_is_two_round_trips_to_redis(
    redis_medium: Medium, firing: str, finalizing: bool
):
    manager = warmed_up(redis_medium, finalizing=finalizing)
    with commands(manager) as sent:
        FIRINGS[firing](manager)
    assert sent == ['EVALSHA', 'EVALSHA']


def test_a_firing_into_a_new_session_is_two_round_trips_to_redis(redis_medium: Medium):
    warmed_up(redis_medium)
    manager = redis_medium.manager(TASKS, 'order:new')
    with commands(manager) as sent:
        manager.fire('a')
    assert sent == ['EVALSHA', 'EVALSHA']


def test_a_repeated_event_id_is_one_round_trip_to_redis(redis_medium: Medium):
    manager = warmed_up(redis_medium)
    manager.fire('a', event_id='e')
    with commands(manager) as sent:
        assert manager.fire('a', event_id='e').duplicate
    assert sent == ['EVALSHA']


def test_a_conflict_is_one_more_round_trip_to_redis(redis_medium: Medium):
    """The refused commit answers with what is needed to decide again."""
    manager = warmed_up(redis_medium)
    storage: Any = manager.storage
    real, sent = storage._commit, []

    def late(commit: Any, request: Any) -> Any:
        storage._commit = real
        redis_medium.manager(TASKS).fire('a')
        with commands(manager) as later:
            result = real(commit, request)
        sent.extend(later)
        return result

    storage._commit = late
    with slices(manager) as found:
        manager.fire('b')
    assert sent == ['EVALSHA']
    assert len(found) == 1
    assert statuses(manager)['t_join#0'] == 'scheduled'


def test_a_claim_is_one_round_trip_and_an_outcome_are_two(redis_medium: Medium):
    manager = warmed_up(redis_medium)
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    with commands(manager) as sent:
        assert run.claim()
    assert sent == ['EVALSHA']
    with commands(manager) as sent:
        assert run.finish({'n': 1})
    assert sent == ['EVALSHA', 'EVALSHA']
    assert statuses(manager)['t_next#0'] == 'scheduled'


def test_a_session_with_a_configuration_of_its_own_costs_one_more_read(redis_medium: Medium):
    """What it needs is known only after its configuration is."""
    manager = warmed_up(redis_medium)
    manager.update_configuration({'t_own': {'after': ['a', 'own', 'more'], 'run': 'x'}})
    manager.fire('own')
    with commands(manager) as sent:
        manager.fire('own')
    assert sent == ['EVALSHA'] * 3


#: The statements of a read and of a commit.
READ = ['BEGIN', 'SELECT', 'SELECT', 'SELECT', 'SELECT']


def test_the_statements_of_a_firing_that_releases_nothing(sql_medium: Medium):
    manager = warmed_up(sql_medium)
    with statements(manager) as sent:
        manager.fire('a')
    # The session, its entries, who waits, the made-up event id.
    assert sent == [
        *READ,
        # The session; the latest kwargs and the history; the made-up event id.
        'BEGIN', 'UPDATE', 'DELETE', 'INSERT', 'DELETE', 'INSERT',
    ]


def test_the_statements_of_a_firing_that_releases(sql_medium: Medium):
    manager = warmed_up(sql_medium)
    with statements(manager) as sent:
        manager.fire('b')
    # Beside the above: the row of the instance, that it does not wait any more, its due date.
    assert sent == [
        *READ,
        'BEGIN', 'UPDATE', 'UPDATE', 'DELETE', 'INSERT', 'DELETE', 'DELETE', 'INSERT',
        'UPDATE', 'INSERT',
    ]


def test_the_statements_of_a_claim_and_of_an_outcome(sql_medium: Medium):
    manager = warmed_up(sql_medium)
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    with statements(manager) as sent:
        assert run.claim()
    assert sent == ['BEGIN', 'SELECT', 'UPDATE', 'UPDATE']
    with statements(manager) as sent:
        assert run.finish({'n': 1})
    assert sent == [
        *READ, 'SELECT',
        'BEGIN', 'UPDATE', 'INSERT', 'UPDATE', 'DELETE', 'INSERT', 'DELETE', 'INSERT',
        # The due date of the one that ended goes, that of the released one comes.
        'DELETE', 'UPDATE', 'INSERT',
    ]


@pytest.mark.parametrize('finalizing', [False, True])
def test_a_slice_never_grows_with_the_session(medium: Medium, finalizing: bool):
    """2,000 instances that wait for something else cost a firing nothing."""
    counter = {'redis': commands, 'sql': statements}.get(medium.key)
    costs = []
    for size in (2, 2000):
        manager = medium.manager(TASKS, f'order:{size}', finalizing=finalizing)
        manager.fire('a')
        fill(manager, size)
        with slices(manager) as found:
            if counter is None:
                sent: list[str] = []
                manager.fire('nothing')
                released = manager.fire('b').released
            else:
                with counter(manager) as sent:
                    manager.fire('nothing')
                    released = manager.fire('b').released
        assert released == ['t_join#0']
        rows = sum(len(part.rows) for part in found)
        entries = sum(len(part.entries) for part in found)
        costs.append((list(sent), rows, entries, len(found)))
    assert costs[0] == costs[1]
    assert costs[0][1] == 1, 'the one instance that waits for it'


def fill(manager: TriggerManager, size: int) -> None:
    """Let so many instances wait for something else."""

    def decide(step: Any) -> None:
        for number in range(size):
            step.fire('item', {'n': number})

    manager.change(plans.firing('item'), decide)
    assert len(statuses(manager)) == size + 1


def test_a_history_and_event_ids_do_not_grow_a_slice(medium: Medium):
    costs = []
    for size in (1, 60):
        manager = medium.manager(TASKS, f'order:{size}')
        manager.fire('a')
        for number in range(size):
            manager.fire('nothing', event_id=f'e{number}')
        with slices(manager) as found:
            manager.fire('nothing', event_id='new')
        costs.append(sum(len(part.entries) + len(part.rows) for part in found))
    assert costs == [1, 1], 'the latest kwargs of the trigger'
