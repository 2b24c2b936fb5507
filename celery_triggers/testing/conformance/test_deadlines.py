"""Deadlines: what still waits when its date comes expires, once, and is never released."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import (
    application_of,
    delivery,
    eventually,
    fired,
    statuses,
)
from celery_triggers.testing.conformance.test_sweep import (
    did,
    dues,
    hasten,
    sweep,
    sweep_in_threads,
)
from celery_triggers.testing.media import Medium

SOON = 0.2

#: How many deadlines pass while nobody sweeps; ``TRIGGERS_DEADLINES=100000`` takes minutes.
MANY = int(os.environ.get('TRIGGERS_DEADLINES', '30'))


def report(**directives: Any) -> dict[str, Any]:
    return {'run': 'report', 'after': ['a', 'b'], **directives}


def deadline_of(manager: TriggerManager, name: str = 't_x#0') -> datetime:
    deadline = manager.storage[name].deadline
    assert deadline is not None
    return deadline


def pass_by(manager: TriggerManager, name: str = 't_x#0') -> None:
    """Wait until a deadline has passed by the storage's clock; nobody sweeps meanwhile."""
    at = deadline_of(manager, name).timestamp() * 1000
    eventually(lambda: manager.storage.read(Plan()).now > at, 'the deadline passes')


def test_the_first_firing_lets_deadlines_count(medium: Medium):
    manager = medium.manager({
        't_x': report(within=60), 't_y': report(), 't_z': report(after=['never'], within=1.5),
    })
    at = manager.fire('other').at
    assert statuses(manager) == {'t_x#0': 'unstarted', 't_z#0': 'unstarted'}
    assert deadline_of(manager) == at + timedelta(seconds=60)
    assert deadline_of(manager, 't_z#0') == at + timedelta(seconds=1.5)
    milliseconds = round(at.timestamp() * 1000)
    assert dues(medium, manager) == {
        't_x#0': milliseconds + 60_000, 't_z#0': milliseconds + 1500,
    }
    manager.fire('other')
    manager.fire('a')
    assert statuses(manager)['t_x#0'] == 'unstarted'
    assert deadline_of(manager) == at + timedelta(seconds=60)
    assert 't_x#1' not in statuses(manager)


def test_start_lets_them_count_without_a_firing(medium: Medium):
    manager = medium.manager({'t_x': report(within=60)})
    manager.start()
    deadline = deadline_of(manager)
    manager.start()
    manager.fire('a')
    assert deadline_of(manager) == deadline
    assert list(statuses(manager)) == ['t_x#0']


def test_what_touches_a_session_otherwise_does_not_begin_it(medium: Medium):
    manager = medium.manager({'t_y': report()})
    manager.update_configuration({'t_x': report(within=60)})
    assert statuses(manager) == {}
    at = manager.fire('other').at
    assert deadline_of(manager) == at + timedelta(seconds=60)


def test_the_sweep_expires_what_still_waits(medium: Medium):
    manager = medium.manager({
        't_x': report(within=SOON), 't_late': {'run': 'late', 'after': ['t_x:expired']},
        't_gone': {'run': 'gone', 'after': ['t_x:abandoned']},
    })
    manager.fire('a', {'n': 1})
    report_of = eventually(lambda: did(sweep(medium, manager)), 'the sweep finds it')
    assert report_of == {'expired': 1}
    instance = manager.storage['t_x#0']
    assert instance.status == 'abandoned'
    assert instance.metadata['reason'] == 'deadline'
    assert fired(manager) == ['a', 't_x:expired'], 'and nothing else'
    assert statuses(manager)['t_late#0'] == 'scheduled'
    assert manager.storage['t_late#0'].kwargs['t_x:expired'] == {
        'instance': 't_x#0', 'reason': 'deadline', 'missing': ['b'], 'received': ['a'],
    }
    assert 't_x#0' not in dues(medium, manager)
    assert did(sweep(medium, manager)) == {}
    assert manager.fire('b').released == []


def test_a_deadline_that_has_passed_never_releases(medium: Medium):
    manager = medium.manager({'t_x': report(within=SOON)})
    manager.fire('a')
    pass_by(manager)
    firing = manager.fire('b')
    assert (firing.released, firing.abandoned) == ([], ['t_x#0'])
    assert fired(manager) == ['a', 'b', 't_x:expired']
    # What it received last is told: it came too late.
    assert manager.storage.history[-1].kwargs['received'] == ['a', 'b']
    assert dues(medium, manager) == {}


def test_a_deadline_that_has_passed_comes_before_unless(medium: Medium):
    manager = medium.manager({'t_x': report(within=SOON, unless=['c'])})
    manager.fire('a')
    pass_by(manager)
    manager.fire('c')
    assert fired(manager) == ['a', 'c', 't_x:expired']


@pytest.mark.parametrize('end', ['released', 'abandoned', 'cancelled', 'removed', 'revoked'])
def test_what_no_longer_waits_has_no_deadline(medium: Medium, end: str):
    manager = medium.manager({'t_x': report(within=60, unless=['c'])})
    manager.fire('a')
    ends: dict[str, Callable[[], Any]] = {
        'released': lambda: manager.fire('b'),
        'abandoned': lambda: manager.fire('c'),
        'cancelled': lambda: manager.cancel(),
        'removed': lambda: manager.remove_tasks(['t_x']),
        'revoked': lambda: manager.update_instance_status('t_x#0', 'revoked'),
    }
    ends[end]()
    assert manager.storage['t_x#0'].deadline is None
    found = dues(medium, manager)
    if end == 'released':
        # That it is sent is due soon.
        assert found['t_x#0'] < manager.storage.read(Plan()).now + 31_000
    else:
        assert found == {}


def test_later_instances_count_from_their_own_creation(medium: Medium):
    manager = medium.manager({'t_x': report(after=['a'], andEvery='d', within=60)})
    first = manager.fire('other').at
    manager.fire('d', {'n': 0})
    second = manager.fire('d', {'n': 1}).at
    assert deadline_of(manager, 't_x#0') == first + timedelta(seconds=60)
    assert deadline_of(manager, 't_x#1') == second + timedelta(seconds=60)
    assert [manager.storage[f't_x#{n}'].kwargs['d']['n'] for n in range(2)] == [0, 1]


def test_a_session_has_deadlines_of_its_own(medium: Medium):
    manager = medium.manager({'t_x': report(), 't_y': report(within=60)})
    until = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(hours=3)
    manager.start(until={'t_x': until, 't_y': until.astimezone(timezone(timedelta(hours=5)))})
    assert deadline_of(manager) == deadline_of(manager, 't_y#0') == until
    milliseconds = round(until.timestamp() * 1000)
    assert dues(medium, manager) == {'t_x#0': milliseconds, 't_y#0': milliseconds}
    later = until + timedelta(days=1)
    manager.fire('a')
    manager.start(until={'t_x': later})
    assert (deadline_of(manager), deadline_of(manager, 't_y#0')) == (later, until)
    assert dues(medium, manager)['t_x#0'] == milliseconds + 86_400_000
    # A change of the configuration is not about this session's own dates.
    manager.update_configuration({'t_x': report(within=5)})
    assert deadline_of(manager) == later


def test_a_date_in_the_past_expires_at_once(medium: Medium):
    manager = medium.manager({'t_x': report()})
    manager.fire('a')
    manager.start(until={'t_x': datetime(2020, 1, 1, tzinfo=timezone.utc)})
    assert fired(manager) == ['a', 't_x:expired']
    assert dues(medium, manager) == {}


def test_what_was_released_has_no_date_any_more(medium: Medium):
    manager = medium.manager({'t_x': report()})
    manager.fire('a')
    manager.fire('b')
    manager.start(until={'t_x': datetime(2020, 1, 1, tzinfo=timezone.utc)})
    assert statuses(manager) == {'t_x#0': 'scheduled'}


@pytest.mark.parametrize('until', [datetime(2030, 1, 1), '2030-01-01', 7, None])
def test_a_date_without_a_zone_is_refused(medium: Medium, until: Any):
    manager = medium.manager({'t_x': report()})
    with pytest.raises(TypeError, match="deadline of 't_x' is an aware datetime"):
        manager.start(until={'t_x': until})
    assert not manager.storage.exists


def test_a_date_of_nothing_is_refused(medium: Medium):
    manager = medium.manager({'t_x': report()})
    with pytest.raises(InvalidConfiguration, match="no trigger task 't_z'"):
        manager.start(until={'t_z': datetime(2030, 1, 1, tzinfo=timezone.utc)})
    assert not manager.storage.exists


def test_deadlines_follow_the_configuration(medium: Medium):
    manager = medium.manager({'t_x': report(within=60)})
    at = manager.fire('a').at
    manager.update_configuration({'t_x': report(within=90)})
    assert deadline_of(manager) == at + timedelta(seconds=90)
    assert dues(medium, manager) == {'t_x#0': round(at.timestamp() * 1000) + 90_000}
    manager.update_configuration({'t_x': report()})
    assert manager.storage['t_x#0'].deadline is None
    assert dues(medium, manager) == {}
    manager.update_configuration({'t_x': report(within=0.001)})
    assert eventually(lambda: fired(manager)[1:] or did(sweep(medium, manager)))
    assert fired(manager) == ['a', 't_x:expired']


def test_a_deadline_that_comes_with_an_update_counts_from_then(medium: Medium):
    manager = medium.manager({'t_x': report()})
    manager.fire('other')
    before = manager.storage.read(Plan()).now
    manager.update_configuration({'t_y': report(within=60)})
    at = deadline_of(manager, 't_y#0').timestamp() * 1000
    assert before + 60_000 <= at <= manager.storage.read(Plan()).now + 60_001


def test_a_replay_has_no_deadline(medium: Medium):
    manager = medium.manager({'t_x': report(within=60)})
    manager.fire('a')
    manager.fire('b')
    run = delivery(manager, 't_x#0')
    assert run.claim()
    assert run.fail('raised', {})
    manager.replay_failed_instance('t_x#0')
    assert manager.storage['t_x#1'].deadline is None
    assert statuses(manager)['t_x#1'] == 'scheduled'


def test_a_date_that_is_looked_at_too_early_is_put_back(medium: Medium):
    manager = medium.manager({'t_x': report(within=60)})
    manager.fire('a')
    at = dues(medium, manager)['t_x#0']
    hasten(manager)
    assert did(sweep(medium, manager)) == {'postponed': 1}
    assert dues(medium, manager) == {'t_x#0': at}
    assert statuses(manager) == {'t_x#0': 'unstarted'}


def test_many_sweeps_expire_each_once(medium: Medium):
    number = 30
    manager = medium.manager({'t_x': report(within=SOON, andEvery='d')})
    for n in range(number):
        manager.fire('d', {'n': n})
    pass_by(manager, f't_x#{number - 1}')
    sweep_in_threads(medium, manager, count=3, limit=7)
    eventually(lambda: sweep(medium, manager).taken == 0 and not dues(medium, manager))
    assert fired(manager).count('t_x:expired') == number
    assert set(statuses(manager).values()) == {'abandoned'}


@pytest.mark.timeout(max(300, MANY // 20))
def test_deadlines_that_nobody_looked_at_for_long_expire_once_each(medium: Medium):
    configuration = {
        't_x': report(within=SOON), 't_tell': {'run': 'tell', 'andEvery': 't_x:expired'},
    }
    # Nothing is sent here, and sweeps are not to send it again.
    application = medium.application(configuration, triggers_dispatch_grace=1e6)
    managers = [medium.manager(application, f'order:{n}') for n in range(MANY)]
    for manager in managers:
        manager.fire('a')
    pass_by(managers[-1])
    sweep_beside_each_other_until_told(medium, managers)
    for manager in managers:
        assert fired(manager) == ['a', 't_x:expired']
        assert statuses(manager) == {'t_tell#0': 'scheduled', 't_x#0': 'abandoned'}
    assert application.released == ['t_tell#0'] * MANY


def sweep_beside_each_other_until_told(medium: Medium, managers: list[TriggerManager]) -> None:
    """Sweep in some threads until every session has had its deadline."""
    done = threading.Event()

    def sweep_on() -> None:
        while not done.is_set():
            if not sweep(medium, managers[0]).taken:
                done.wait(0.01)

    threads = [threading.Thread(target=sweep_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        eventually(
            lambda: len(application_of(managers[0]).releases) >= MANY,
            'every deadline is seen to', max(60, MANY / 50),
        )
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_session_does_not_go_while_a_deadline_is_to_come(medium: Medium):
    manager = medium.manager({'t_x': report(within=3600)}, triggers_session_expires=0.001)
    manager.fire('a')
    application_of(manager)
    eventually(lambda: did(sweep(medium, manager)).get('postponed'))
    assert manager.storage.exists
    manager.cancel()
    eventually(lambda: did(sweep(medium, manager)).get('deleted'))
    assert not manager.storage.exists


def test_what_expired_is_resolved_for_the_finalization(medium: Medium):
    manager = medium.manager({'t_x': report(within=SOON)}, finalizing=True)
    manager.fire('a')
    eventually(lambda: did(sweep(medium, manager)).get('expired'))
    assert fired(manager) == ['a', 't_x:expired', 'sessionFinalized']


def test_explain_says_until_when_it_waits(medium: Medium):
    manager = medium.manager({'t_x': report()})
    manager.start(until={'t_x': datetime(2130, 5, 1, 12, tzinfo=timezone.utc)})
    [told] = manager.explain()
    assert str(told) == (
        't_x#0 is unstarted: it has nothing and waits for a, b, until 2130-05-01 12:00:00 UTC'
    )
