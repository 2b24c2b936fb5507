"""A firing of a run that is repeated because the storage gave no answer is applied once."""

from __future__ import annotations

import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.task import TaskContext
from celery_triggers.testing.conformance.support import lose_answer
from tests.unit.conftest import World
from tests.unit.test_cascade_limit import run_of


def test_a_repeated_firing_has_the_same_id() -> None:
    world = World(triggers_unheard='ignore')
    world.configure({'t_a': {'after': ['go']}})
    world.fire('go')
    assert world.delivery('t_a#0').claim()
    context = TaskContext(world.manager(), 't_a#0', {}, run=run_of(world, 't_a#0'))
    lose_answer(context.manager.storage)
    with pytest.raises(StorageUnavailable):
        context.fire('x', {'n': 1})
    assert context.fire('x', {'n': 1}).duplicate
    assert not context.fire('x', {'n': 1}).duplicate, 'a second one is another'
    assert world.fired() == ['go', 'x', 'x']
