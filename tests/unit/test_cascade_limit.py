"""Loops of trigger tasks are stopped, and the loop is named."""

from __future__ import annotations

import re
from typing import Any

import pytest

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.cycles import loop_through
from celery_triggers.exceptions import CascadeLimitExceeded, ClaimLost
from celery_triggers.manager.firing import Run
from celery_triggers.task import TaskContext
from tests.unit.conftest import World


def run_of(world: World, name: str, token: str = 'token') -> Run:
    header = world.headers[name]
    return Run(name, header['task_id'], header['attempt'], header['incarnation'], token)


def run_all(world: World, *, fail: bool = False, most: int = 50, done: int = 0) -> int:
    """End whatever is released, until nothing is; return how many have run."""
    while done < len(world.released):
        assert done < most, 'it does not stop'
        name = world.released[done]
        done += 1
        assert world.delivery(name).claim()
        if fail:
            world.delivery(name).fail('raised', {'type': 'E', 'message': ''})
        else:
            world.delivery(name).finish(None)
    return done


def test_a_loop_is_stopped_and_named(caplog: Any) -> None:
    world = World(triggers_max_cascade=5, triggers_unheard='ignore')
    world.configure({'t_a': {'andEvery': 't_b'}, 't_b': {'andEvery': 't_a'}})
    world.fire('t_a')
    assert run_all(world) == 6
    *finished, last = list(world.storage())
    by_order = {i.name: i for i in (*finished, last)}
    stopped = [i for i in by_order.values() if i.status == 'failed']
    assert len(stopped) == 1
    assert stopped[0].metadata['reason'] == 'cascade limit'
    exception = stopped[0].metadata['exception']
    assert exception['type'] == 'CascadeLimitExceeded'
    assert re.search('t_a -> t_b -> t_a|t_b -> t_a -> t_b', exception['message'])
    assert 'triggers_max_cascade' in exception['message']
    assert exception['message'] in caplog.text
    assert not any(trigger.endswith(':failed') for trigger in world.fired())


def test_a_loop_of_failures_is_stopped_too() -> None:
    world = World(triggers_max_cascade=4, triggers_unheard='ignore')
    world.configure({
        't_go': {'after': ['go']},
        't_a': {'andEvery': 't_b:failed'},
        't_b': {'andEvery': 't_a:failed', 'after': []},
        't_c': {'after': ['t_go:failed']},
    })
    world.manager().start()
    world.manager().create_instance('t_a')
    world.manager().update_instance_status('t_a#0', 'revoked')
    world.manager().replay_failed_instance('t_a#0')
    assert run_all(world, fail=True) == 5
    last = world.storage()[world.released[-1]]
    assert last.status == 'failed'
    assert 't_b -> t_a' in last.metadata['cascade limit']


def test_cascades_that_end_are_not_held_up() -> None:
    world = World(triggers_max_cascade=3, triggers_unheard='ignore')
    chain = {f't_{n + 1}': {'after': [f't_{n}']} for n in range(3)}
    world.configure({'t_0': {'after': ['go']}, **chain})
    world.fire('go')
    assert run_all(world) == 4
    assert set(world.statuses().values()) == {'finished'}, 'nobody listens to the last one'


def test_a_firing_from_outside_begins_anew() -> None:
    world = World(triggers_max_cascade=2, triggers_unheard='ignore')
    world.configure({'t_a': {'andEvery': 'go'}, 't_b': {'andEvery': 't_a'}})
    for number in range(10):
        world.fire('go')
        assert run_all(world, done=2 * number) == 2 * (number + 1)
    assert set(world.statuses().values()) == {'finished'}


def test_a_person_may_carry_a_stopped_loop_on() -> None:
    world = World(triggers_max_cascade=1, triggers_unheard='ignore')
    world.configure({'t_a': {'andEvery': 't_b'}, 't_b': {'andEvery': 't_a'}})
    world.fire('t_a')
    run_all(world)
    (stopped,) = [i for i in world.storage() if i.status == 'failed']
    before = len(world.released)
    world.manager().skip_failed_instance(stopped, cascade=True)
    assert len(world.released) == before + 1


def test_a_task_that_fires_its_own_trigger_for_ever_is_stopped() -> None:
    world = World(triggers_max_cascade=3, triggers_unheard='ignore')
    world.configure({'t_a': {'andEvery': 'tick'}})
    world.fire('tick')

    def fire_on(number: int) -> None:
        name = world.released[number]
        assert world.delivery(name).claim()
        TaskContext(world.manager(), name, {}, run=run_of(world, name)).fire('tick')

    for number in range(3):
        fire_on(number)
    with pytest.raises(CascadeLimitExceeded, match='triggers_max_cascade') as caught:
        fire_on(3)
    assert caught.value.limit == 3
    assert len(world.released) == 4


def test_a_run_without_its_claim_fires_nothing() -> None:
    world = World(triggers_unheard='ignore')
    world.configure({'t_a': {'after': ['go']}, 't_b': {'after': ['x']}})
    world.fire('go')
    run = TaskContext(world.manager(), 't_a#0', {}, run=run_of(world, 't_a#0'))
    with pytest.raises(ClaimLost, match='claim is gone'):
        run.fire('x')
    assert world.delivery('t_a#0').claim()
    assert run.fire('x').released == ['t_b#0']
    assert world.delivery('t_a#0').retry(0)
    with pytest.raises(ClaimLost, match='attempt is over') as caught:
        run.fire('y')
    assert caught.value.instance == 't_a#0'
    world.storage().delete()
    with pytest.raises(ClaimLost, match='deleted'):
        run.fire('z')
    assert world.fired() == []


def test_what_a_run_fired_is_found_again_after_its_claim_is_gone() -> None:
    """A repeat of what was applied answers as it did, whoever asks."""
    world = World(triggers_unheard='ignore')
    world.configure({'t_a': {'after': ['go']}, 't_b': {'after': ['x']}})
    world.fire('go')
    assert world.delivery('t_a#0').claim()
    first = TaskContext(world.manager(), 't_a#0', {}, run=run_of(world, 't_a#0'))
    assert not first.fire('x').duplicate
    again = TaskContext(world.manager(), 't_a#0', {}, run=run_of(world, 't_a#0', 'other'))
    assert again.fire('x').duplicate


@pytest.mark.parametrize(
    ('configuration', 'loop'),
    [
        ({'t_a': {'after': ['x']}}, None),
        ({'t_a': {'andEvery': 't_a'}}, ['t_a', 't_a']),
        ({'t_a': {'andEvery': 't_b'}, 't_b': {'after': ['t_a']}}, ['t_a', 't_b', 't_a']),
        ({'t_a': {'andEvery': 't_b:failed'}, 't_b': {'after': ['t_a:revoked']}},
         ['t_a', 't_b', 't_a']),
        ({'t_a': {'after': ['x']}, 't_b': {'andEvery': 't_c'}, 't_c': {'andEvery': 't_b'}}, None),
    ],
)
def test_the_loop_through_a_task_is_found(configuration: Any, loop: list[str] | None) -> None:
    tasks = {name: {'run': 'x', **task} for name, task in configuration.items()}
    assert loop_through(Configuration.parse(tasks), 't_a') == loop
