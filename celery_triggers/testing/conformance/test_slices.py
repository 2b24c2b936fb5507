"""What a firing reads: never more because the session holds more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import pytest

from celery_triggers.engine import plans
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.follow_up import make_change
from celery_triggers.storages.records import Slice
from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.media import Medium

T = TypeVar('T')

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_next': {'after': ['t_join'], 'run': 'x'},
    't_many': {'andEvery': 'item', 'after': ['never'], 'run': 'x'},
}


@contextmanager
def slices(manager: TriggerManager) -> Iterator[list[Slice]]:
    """Note what is read."""
    storage: Any = manager.storage
    real = storage._read
    found: list[Slice] = []

    def noting(request: Any) -> Slice:
        found.append(real(request))
        return found[-1]

    storage._read = noting
    try:
        yield found
    finally:
        storage._read = real


def fill(manager: TriggerManager, size: int) -> None:
    """Let so many instances wait for something else."""

    def decide(step: Any) -> None:
        for number in range(size):
            step.fire('item', {'n': number})

    make_change(manager, plans.firing('item'), decide)
    assert len(statuses(manager)) == size + 1


def cost_among(
    manager: TriggerManager, size: int, counting: Callable[[], AbstractContextManager[T]]
) -> T:
    """Return what is counted of two firings while so many instances wait for something else."""
    manager.fire('a')
    fill(manager, size)
    with counting() as cost:
        manager.fire('nothing')
        released = manager.fire('b').released
    assert released == ['t_join#0']
    return cost


@pytest.mark.parametrize('finalizing', [False, True])
def test_a_slice_never_grows_with_the_session(medium: Medium, finalizing: bool):
    """Instances that wait for something else cost a firing nothing."""
    costs = []
    for size in (2, 200):
        manager = medium.manager(TASKS, f'order:{size}', finalizing=finalizing)
        found = cost_among(manager, size, partial(slices, manager))
        rows = sum(len(part.rows) for part in found)
        entries = sum(len(part.entries) for part in found)
        costs.append((rows, entries, len(found)))
    assert costs[0] == costs[1]
    assert costs[0][0] == 1, 'the one instance that waits for it'


def test_a_history_and_event_ids_do_not_grow_a_slice(medium: Medium):
    costs = []
    for size in (1, 20):
        manager = medium.manager(TASKS, f'order:{size}')
        manager.fire('a')
        for number in range(size):
            manager.fire('nothing', event_id=f'e{number}')
        with slices(manager) as found:
            manager.fire('nothing', event_id='new')
        costs.append(sum(len(part.entries) + len(part.rows) for part in found))
    assert costs == [1, 1], 'the latest kwargs of the trigger'
