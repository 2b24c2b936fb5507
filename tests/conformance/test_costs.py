"""What each operation costs in Redis: round trips are counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.conformance.test_slices import TASKS, cost_among, slices
from celery_triggers.testing.media import Medium


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


@pytest.mark.parametrize('finalizing', [False, True])
def test_the_round_trips_to_redis_never_grow_with_the_session(
    redis_medium: Medium, finalizing: bool
):
    """2,000 instances that wait for something else cost a firing nothing."""
    costs = []
    for size in (2, 2000):
        manager = redis_medium.manager(TASKS, f'order:{size}', finalizing=finalizing)
        costs.append(cost_among(manager, size, partial(commands, manager)))
    assert costs[0] == costs[1]
