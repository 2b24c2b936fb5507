"""Leases, sweeps and lost workers, in each kind of pool."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery import states

from tests.parts.servers import BROKER_DB, redis_url

QUICK = {
    'triggers_lease': 1, 'triggers_sweep_interval': 0.2, 'triggers_dispatch_grace': 1,
    'triggers_max_deliveries': 3,
}
POOLS = {
    'prefork': ('--pool', 'prefork', '--concurrency', '2'),
    'threads': ('--pool', 'threads', '--concurrency', '2'),
    'solo': ('--pool', 'solo'),
    'gevent': ('--pool', 'gevent', '--concurrency', '10'),
}


@pytest.fixture(scope='module', params=POOLS)
def any_pool(request: Any, redis_server: str, start_worker: Any) -> Iterator[Any]:
    worker = start_worker(redis_url(BROKER_DB), *POOLS[request.param], **QUICK)
    yield worker
    worker.stop()


@pytest.fixture(scope='module')
def prefork(broker: str, redis_server: str, start_worker: Any) -> Iterator[Any]:
    worker = start_worker(broker, *POOLS['prefork'], **QUICK)
    yield worker
    worker.stop()


def test_a_task_that_outlives_its_lease_runs_once(any_pool):
    uid = any_pool.fire('leases', 'linger', {'seconds': 3})
    found = any_pool.settled(uid, count=2)
    assert {str(i.status) for i in found.values()} == {'finished'}
    assert any_pool.lines(uid) == ['begins', 'ends']
    assert found['t_lingers#0'].record.lost == []


def test_what_waits_too_long_expires(any_pool):
    uid = any_pool.fire('deadlines', 'begun')
    found = any_pool.settled(uid, count=2)
    assert {n: str(i.status) for n, i in found.items()} == {
        't_makeshift#0': 'finished', 't_patient#0': 'abandoned',
    }
    assert found['t_makeshift#0'].result == ['never']
    assert any_pool.fired(uid) == ['begun', 't_patient:expired', 't_makeshift']


def test_a_long_retry_waits_in_the_storage(any_pool):
    queue = f'{any_pool.name}-other'
    uid = any_pool.fire('leases', 'retry later', {'countdown': 2.5, 'queue': queue})
    waiting = any_pool.wait_for(
        lambda: (i := any_pool.storage(uid)['t_retry_later#0']).attempt == 1 and i, 'it is retried'
    )
    assert str(waiting.status) == 'scheduled'
    assert waiting.record.sends == 0, 'nothing was sent: it is a due date'
    assert waiting.record.message['options']['queue'] == queue
    found = any_pool.settled(uid)['t_retry_later#0']
    assert str(found.status) == 'finished'
    first, second = (line.split() for line in any_pool.lines(uid))
    assert [first[1], second[1]] == ['0', '1']
    assert float(second[2]) - float(first[2]) >= 2.4


@pytest.mark.parametrize('trigger', ['die', 'die late', 'die and come back'])
def test_a_lost_child_is_seen_to_at_once(prefork, trigger):
    uid = prefork.fire('leases', trigger)
    found = prefork.settled(uid, count=2 if trigger == 'die and come back' else 1)
    if trigger == 'die':
        (instance,) = found.values()
        assert str(instance.status) == 'failed'
        assert instance.metadata['reason'] == 'worker lost'
        assert prefork.lines(uid) == ['dies']
        return
    assert prefork.lines(uid) == ['dies', 'lives']
    if trigger == 'die late':
        (instance,) = found.values()
        assert str(instance.status) == 'finished'
        assert (instance.attempt, len(instance.record.lost)) == (0, 1)
        return
    first, second = found.values()
    assert (str(first.status), str(second.status)) == ('replayed', 'finished')
    assert second.metadata['parent'] == first.name
    assert second.result == {'depth': 1}


@pytest.mark.parametrize('trigger', ['die unnoticed', 'die unnoticed late'])
def test_a_request_that_celery_gives_to_a_second_child(prefork, trigger):
    """Celery does so if it looks for it before it reads that the first one had begun."""
    uid = prefork.fire('leases', trigger)
    (instance,) = prefork.settled(uid).values()
    if trigger == 'die unnoticed':
        assert prefork.lines(uid) == ['dies'], 'the code of an early task starts once'
        assert str(instance.status) == 'failed'
        assert instance.metadata['reason'] == 'worker lost'
    else:
        assert prefork.lines(uid) == ['dies', 'lives']
        assert (str(instance.status), len(instance.record.lost)) == ('finished', 1)


@pytest.mark.parametrize(('trigger', 'runs'), [('die always', 3), ('die always late', 3)])
def test_what_kills_each_worker_fails_in_the_end(prefork, trigger, runs):
    uid = prefork.fire('leases', trigger)
    found = prefork.settled(uid, count=runs if trigger == 'die always' else 1)
    # A claim may be lost, and count, before its code has begun: the lease is short here.
    assert prefork.lines(uid) in [['dies'] * ran for ran in range(1, runs + 1)]
    last = list(found.values())[-1]
    assert str(last.status) == 'failed'
    assert last.metadata['reason'] == 'worker lost'


@pytest.mark.parametrize('kind', ['late', 'early'])
def test_a_cold_shutdown_gives_back_what_it_did_not_finish(
    redis_server, start_worker, kind, broker
):
    settings = {**QUICK, 'triggers_lease': 60}
    first = start_worker(broker, *POOLS['prefork'], **settings)
    uid = first.fire('leases', f'hold {kind}')
    first.wait_for(lambda: first.lines(uid) == ['runs'], 'the task runs')
    first.process.send_signal(signal.SIGQUIT)
    first.process.wait(30)
    instance = first.storage(uid)[f't_hold_{kind}#0']
    if kind == 'early':
        assert str(instance.status) == 'failed'
        assert instance.metadata['reason'] == 'worker lost'
        return
    assert str(instance.status) == 'scheduled', 'no lease has to lapse'


def test_a_warm_shutdown_waits_and_keeps_the_lease(redis_server, start_worker):
    worker = start_worker(redis_url(BROKER_DB), *POOLS['prefork'], **QUICK)
    uid = worker.fire('leases', 'linger', {'seconds': 3})
    worker.wait_for(lambda: worker.lines(uid) == ['begins'], 'the task runs')
    worker.process.terminate()
    worker.process.wait(30)
    assert worker.lines(uid) == ['begins', 'ends']
    assert str(worker.storage(uid)['t_lingers#0'].status) == 'finished'
    assert worker.storage(uid)['t_lingers#0'].record.lost == []
    assert worker.storage(uid)['t_lingers#0'].async_result.state == states.SUCCESS


def test_a_sweep_by_hand_does_what_workers_do(prefork):
    report = prefork.app.triggers.sweep()
    assert report.errors == 0
    assert str(report).startswith(f'{report.taken} due')
