"""Rules that random sessions meet too rarely, one by one."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from celery_triggers.exceptions import InvalidConfiguration, InvalidFiring
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium


@pytest.fixture
def memory() -> Medium:
    return Medium('memory', prefix=secrets.token_hex(6))


def test_what_only_an_abandoned_task_could_start_does_not_hold_the_finalization_up(memory: Medium):
    manager = memory.manager(
        {
            't_ship': {'after': ['paid'], 'unless': ['cancelled'], 'run': 'x'},
            't_notify': {'after': ['t_ship'], 'run': 'x'},
        },
        finalizing=True,
    )
    manager.fire('cancelled')
    assert fired(manager) == ['cancelled', 't_ship:abandoned', 'sessionFinalized']


def test_what_a_running_task_may_still_start_holds_the_finalization_up(memory: Medium):
    manager = memory.manager(
        {'t_ship': {'after': ['paid'], 'run': 'x'}, 't_notify': {'after': ['t_ship'], 'run': 'x'}},
        finalizing=True,
    )
    manager.fire('paid')
    delivery(manager, 't_ship#0').finish(None)
    assert fired(manager) == ['paid', 't_ship']
    delivery(manager, 't_notify#0').finish(None)
    assert fired(manager)[-1] == 'sessionFinalized'


def test_session_finalized_cannot_be_fired_through_another_manager(memory: Medium):
    configuration = {'t_a': {'after': ['a'], 'run': 'x'}}
    memory.manager(configuration, finalizing=True).fire('b')
    with pytest.raises(InvalidFiring, match='by hand'):
        memory.manager(configuration).fire('sessionFinalized')


@pytest.mark.parametrize(
    'configuration',
    [
        {'t_a': {'after': ['x'], 'andEvery': 't_a:abandoned', 'run': 'x'}},
        {
            't_a': {'andEvery': 't_b:abandoned', 'run': 'x'},
            't_b': {'andEvery': 't_a:abandoned', 'after': ['x'], 'run': 'x'},
        },
    ],
)
def test_a_cycle_of_abandonments_is_refused_also_without_unless(configuration: Any):
    """A cancelled session abandons whatever is made: such a cycle would never end."""
    with pytest.raises(InvalidConfiguration, match='abandonments alone'):
        Medium('memory').manager(configuration)


def test_an_abandonment_by_hand_says_what_was_missing(memory: Medium):
    manager = memory.manager({'t_a': {'after': ['a', 'b'], 'run': 'x'}})
    manager.fire('a')
    manager.update_instance_status('t_a#0', 'abandoned')
    facts = manager.storage.latest_kwargs['t_a:abandoned']
    assert (facts['missing'], facts['received']) == (['b'], ['a'])


def test_a_replaced_task_without_an_instance_gets_past_firings_if_asked(memory: Medium):
    manager = memory.manager({'t_a': {'after': ['never'], 'run': 'x'}})
    manager.fire('a')
    manager.update_configuration({'t_a': {'after': ['a'], 'run': 'x'}})
    assert statuses(manager) == {}
    manager.update_configuration({'t_a': {'after': ['a'], 'run': 'x'}}, apply_past=True)
    assert statuses(manager) == {'t_a#0': 'scheduled'}


def test_each_payload_of_and_every_goes_to_one_instance(memory: Medium):
    manager = memory.manager({'t_a': {'after': ['go'], 'andEvery': 'x', 'run': 'x'}})
    manager.fire('x', {'n': 1})
    manager.fire('x', {'n': 2})
    # Both now lack the payload of the new trigger.
    manager.update_configuration({'t_a': {'after': ['go'], 'andEvery': 'y', 'run': 'x'}})
    manager.fire('go')
    assert manager.fire('y', {'n': 3}).released == ['t_a#0']
    assert manager.fire('y', {'n': 4}).released == ['t_a#1']
    assert manager.fire('y', {'n': 5}).released == ['t_a#2']
