"""Chapter and verse of firing: what a trigger does to the instances that it concerns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from celery_triggers import any_of, at_least
from celery_triggers.exceptions import EventConflict, InvalidFiring, UnheardTrigger


@pytest.mark.parametrize('order', list(itertools.permutations(['a', 'b', 'c'])))
def test_a_condition_is_met_in_any_order(world: Any, order: tuple[str, ...]) -> None:
    world.configure({'t_x': {'after': ['a', 'b', 'c']}})
    *early, last = order
    for name in early:
        assert world.fire(name).released == []
    assert world.fire(last).released == ['t_x#0']


def test_a_redundant_trigger_changes_nothing_and_the_first_kwargs_stay(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.fire('a', {'n': 1})
    world.fire('a', {'n': 2})
    world.fire('b')
    world.fire('b')
    assert world.released == ['t_x#0']
    assert world.kwargs('t_x#0') == {'a': {'n': 1}, 'b': {}}
    assert world.storage().latest_kwargs['a'] == {'n': 2}


def test_without_and_every_a_task_runs_once(world: Any) -> None:
    world.configure({'t_x': {'after': ['a']}})
    for n in range(3):
        world.fire('a', {'n': n})
    assert world.statuses() == {'t_x#0': 'scheduled'}


def test_fired_kwargs_are_merged_over_static_ones_recursively(world: Any) -> None:
    world.configure({
        't_x': {
            'after': ['a', 'b'],
            'withParams': {'a': {'deep': {'left': 0, 'right': 0}, 'only': 'static'}, 'c': {'z': 1}},
        }
    })
    world.fire('a', {'deep': {'left': 1}})
    world.fire('b', {'deep': {'left': 2}})
    assert world.kwargs('t_x#0') == {
        'a': {'deep': {'left': 1, 'right': 0}, 'only': 'static'},
        'b': {'deep': {'left': 2}},
        'c': {'z': 1},
    }


def test_and_every_asks_for_an_instance_for_each_firing(world: Any) -> None:
    world.configure({'t_x': {'after': ['a'], 'andEvery': 'd'}})
    world.fire('a', {'n': 0})
    for n in range(3):
        assert world.fire('d', {'n': n}).released == [f't_x#{n}']
    assert [world.kwargs(f't_x#{n}')['d']['n'] for n in range(3)] == [0, 1, 2]
    assert all(world.kwargs(f't_x#{n}')['a'] == {'n': 0} for n in range(3))


def test_one_late_trigger_releases_three_waiting_and_every_instances(world: Any) -> None:
    world.configure({'t_x': {'after': ['a'], 'andEvery': 'd'}})
    for n in range(3):
        world.fire('d', {'n': n})
    assert world.statuses() == dict.fromkeys(['t_x#0', 't_x#1', 't_x#2'], 'unstarted')
    assert world.fire('a').released == ['t_x#0', 't_x#1', 't_x#2']


def test_a_second_firing_of_another_trigger_creates_nothing(world: Any) -> None:
    world.configure({'t_x': {'after': ['a'], 'andEvery': 'd'}})
    world.fire('a')
    world.fire('d')
    assert world.fire('a').created == []
    assert world.statuses() == {'t_x#0': 'scheduled'}


def test_the_same_trigger_in_after_and_and_every(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'd'], 'andEvery': 'd'}})
    world.fire('d', {'n': 0})
    world.fire('a')
    world.fire('d', {'n': 1})
    assert world.statuses() == {'t_x#0': 'scheduled', 't_x#1': 'scheduled'}
    assert [world.kwargs(f't_x#{n}')['d']['n'] for n in range(2)] == [0, 1]


def test_and_every_alone_needs_nothing_else(world: Any) -> None:
    world.configure({'t_x': {'andEvery': 'd'}})
    assert world.fire('d').released == ['t_x#0']
    assert world.fire('d').released == ['t_x#1']


def test_a_new_instance_never_receives_a_past_and_every_payload(world: Any) -> None:
    world.configure({'t_x': {'after': ['a'], 'andEvery': 'd', 'unless': ['c']}})
    world.fire('d', {'n': 0})
    world.fire('a', {'n': 1})
    world.fire('d', {'n': 2})
    assert [world.kwargs(n)['d'] for n in ('t_x#0', 't_x#1')] == [{'n': 0}, {'n': 2}]


@pytest.mark.parametrize(
    ('order', 'status'),
    [
        (['c', 'a', 'b'], 'abandoned'),
        (['a', 'c', 'b'], 'abandoned'),
        (['a', 'b', 'c'], 'scheduled'),
    ],
    ids=['before', 'between', 'after'],
)
def test_unless_before_between_and_after(world: Any, order: list[str], status: str) -> None:
    world.configure({'t_x': {'after': ['a', 'b'], 'unless': ['c']}})
    for name in order:
        world.fire(name)
    assert world.statuses() == {'t_x#0': status}


def test_a_plain_list_under_unless_means_all_of_it(world: Any) -> None:
    world.configure({'t_x': {'after': ['a'], 'unless': ['c', 'e']}})
    world.fire('c')
    assert world.statuses() == {'t_x#0': 'unstarted'}
    world.fire('e')
    assert world.statuses() == {'t_x#0': 'abandoned'}


def test_unless_abandons_and_every_instances_and_those_that_come_are_born_abandoned(
    world: Any,
) -> None:
    world.configure({'t_x': {'after': ['a'], 'andEvery': 'd', 'unless': ['c']}})
    world.fire('d')
    world.fire('d')
    assert world.fire('c').abandoned == ['t_x#0', 't_x#1']
    firing = world.fire('d')
    assert (firing.created, firing.abandoned) == (['t_x#2'], ['t_x#2'])
    world.fire('a')
    assert set(world.statuses().values()) == {'abandoned'}


def test_an_abandonment_fires_its_outcome_with_what_was_missing(world: Any) -> None:
    world.configure({
        't_x': {'after': ['a', 'b'], 'unless': ['c']},
        't_sorry': {'after': ['t_x:abandoned']},
    })
    world.fire('a')
    assert world.fire('c').released == ['t_sorry#0']
    assert world.kwargs('t_sorry#0')['t_x:abandoned'] == {
        'instance': 't_x#0',
        'reason': 'unless: c',
        'missing': ['b'],
        'received': ['a', 'c'],
    }


def test_outcome_triggers_are_applied_within_the_same_step_in_order(world: Any) -> None:
    world.configure({
        't_b': {'after': ['x'], 'unless': ['c']},
        't_a': {'after': ['x'], 'unless': ['c']},
        't_end': {'after': ['t_a:abandoned', 't_b:abandoned']},
    })
    firing = world.fire('c')
    assert firing.abandoned == ['t_a#0', 't_b#0']
    assert firing.released == ['t_end#0']
    assert world.fired() == ['c', 't_a:abandoned', 't_b:abandoned']


def test_any_at_least_and_nesting(world: Any) -> None:
    world.configure({
        't_any': {'after': {'any': ['a', 'b']}},
        't_two': {'after': {'atLeast': 2, 'of': ['a', 'b', 'c']}},
        't_deep': {'after': any_of('z', at_least(2, 'a', 'c'))},
    })
    assert world.fire('a').released == ['t_any#0']
    assert world.fire('c').released == ['t_deep#0', 't_two#0']


def test_an_event_id_is_applied_once_and_a_repeat_says_what_the_first_did(world: Any) -> None:
    world.configure({'t_x': {'andEvery': 'd'}})
    first = world.fire('d', {'n': 1}, event_id='e1')
    second = world.fire('d', {'n': 1}, event_id='e1')
    assert (first.duplicate, second.duplicate) == (False, True)
    assert (second.created, second.released) == (first.created, first.released) == (
        ['t_x#0'], ['t_x#0'],
    )
    assert world.released == ['t_x#0']


@pytest.mark.parametrize(('trigger', 'kwargs'), [('d', {'n': 2}), ('e', {'n': 1})])
def test_an_event_id_for_something_else_is_a_conflict(
    world: Any, trigger: str, kwargs: dict[str, int]
) -> None:
    world.configure({'t_x': {'andEvery': 'd'}, 't_y': {'andEvery': 'e'}})
    world.fire('d', {'n': 1}, event_id='e1')
    with pytest.raises(EventConflict, match='e1'):
        world.fire(trigger, kwargs, event_id='e1')
    assert world.statuses() == {'t_x#0': 'scheduled'}


def test_event_kwargs_are_compared_by_content_not_by_order(world: Any) -> None:
    world.configure({'t_x': {'andEvery': 'd'}})
    world.fire('d', {'n': 1, 'm': 2}, event_id='e1')
    assert world.fire('d', {'m': 2, 'n': 1}, event_id='e1').duplicate


def test_an_unheard_trigger_is_recorded_and_warned_about_once(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.configure({'t_x': {'after': ['a']}})
    name = f'nobody listens to {id(world)}'
    world.fire(name, {'n': 1})
    world.fire(name)
    assert caplog.text.count(name) == 1
    assert world.storage().latest_kwargs[name] == {}


def test_unheard_triggers_can_be_refused(world: Any) -> None:
    world.settings._get = {'triggers_unheard': 'raise'}.get
    world.configure({'t_x': {'after': ['a']}})
    with pytest.raises(UnheardTrigger, match='they listen to: a'):
        world.fire('b')
    assert not world.storage().exists


@pytest.mark.parametrize('name', ['', None, 7, b'a', '\ud800'])
def test_a_trigger_name_that_is_none_is_refused(world: Any, name: Any) -> None:
    with pytest.raises(InvalidFiring):
        world.fire(name)
    assert not world.storage().exists


@pytest.mark.parametrize('uid', [None, 7, b'a', '\ud800'])
def test_a_uid_that_is_none_is_refused(world: Any, uid: Any) -> None:
    world.uid = uid
    with pytest.raises(InvalidFiring, match='uid'):
        world.fire('a')


@pytest.mark.parametrize('outcome', ['failed', 'revoked', 'abandoned', 'expired'])
def test_outcome_names_are_not_fired_by_hand(world: Any, outcome: str) -> None:
    with pytest.raises(InvalidFiring, match='outcome'):
        world.fire(f't_x:{outcome}')
    assert not world.storage().exists


@pytest.mark.parametrize(
    'kwargs', [[], 'text', 7, {1: 2}, {'f': object}, {'f': {1, 2}}], ids=repr
)
def test_kwargs_that_are_no_mapping_or_not_serializable_are_refused(
    world: Any, kwargs: Any
) -> None:
    with pytest.raises(InvalidFiring, match='kwargs'):
        world.fire('a', kwargs)
    assert not world.storage().exists


@pytest.mark.parametrize('event_id', ['', 7, b'e'])
def test_an_event_id_is_a_string(world: Any, event_id: Any) -> None:
    with pytest.raises(InvalidFiring, match='event id'):
        world.fire('a', event_id=event_id)


def test_kwargs_are_copied_when_they_are_fired(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    kwargs = {'list': [1]}
    world.fire('a', kwargs)
    kwargs['list'].append(2)
    assert world.kwargs('t_x#0')['a'] == {'list': [1]}


def test_two_sessions_never_meet(world: Any) -> None:
    world.configure({'t_x': {'after': ['a', 'b']}})
    world.manager('one').fire('a')
    world.manager('two').fire('b')
    assert world.released == []
