"""Messages whose headers another package has reshaped, as common tracing does.

``headers['headers']`` makes Celery give a task that mapping alone as ``request.headers``. The
whole suite can be run so, with ``TRIGGERS_TEST_RESHAPED=1``; these are the ways a header goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import integration_app
import pytest
from celery.signals import before_task_publish


@pytest.fixture(scope='module')
def traced(broker: str, redis_server: str, start_worker: Any) -> Iterator[Any]:
    """A worker, and this process, in which each message is reshaped."""
    worker = start_worker(broker, '--pool', 'prefork', '--concurrency', '2', reshaped=True)
    yield worker
    worker.stop()
    before_task_publish.disconnect(integration_app.nest_headers)


def ended(worker: Any, uid: str, **statuses: str) -> None:
    """Wait until nothing is on its way, and say how each instance has ended."""
    found = worker.settled(uid, len(statuses))
    assert {name: str(i.status) for name, i in found.items()} == {
        f't_{task}#0': status for task, status in statuses.items()
    }


def test_messages_are_reshaped(traced: Any) -> None:
    seen: list[Any] = []
    before_task_publish.connect(
        lambda headers=None, **_: seen.append(headers), weak=False, dispatch_uid='test'
    )
    try:
        traced.fire('runs', 'plain', {'v': 5})
    finally:
        before_task_publish.disconnect(dispatch_uid='test')
    assert [headers['headers'] for headers in seen] == [{'x-trace': '1'}]


def test_a_task_of_any_kind_ends_its_instance_and_runs_once(traced: Any) -> None:
    """The reshaped header of one that takes arguments was lost, and it ran with each delivery."""
    uid = traced.fire('runs', 'plain', {'v': 5})
    ended(traced, uid, plain='finished')
    assert traced.fired(uid) == ['plain', 't_plain']


@pytest.mark.parametrize('name', ['chain', 'group', 'chord', 'broken_chain'])
def test_what_takes_its_place_carries_its_claim(traced: Any, name: str) -> None:
    uid = traced.fire('runs', name, {'v': 5})
    ended(traced, uid, **{name: 'failed' if 'broken' in name else 'finished'})
    after = f't_{name}:failed' if 'broken' in name else f't_{name}'
    assert traced.fired(uid) == [name, after]


def test_a_gate_inside_waits_and_goes_on(traced: Any) -> None:
    uid = traced.fire('runs', 'gated', {'v': 5})
    traced.wait_for(
        lambda: [i for i in traced.storage(uid) if i.status == 'unstarted'], 'the gate waits'
    )
    traced.app.triggers.fire(uid, 'more', {'v': 10})
    assert traced.status(uid, 't_gated#0', 'finished').async_result.get(timeout=20) == 17
    assert traced.fired(uid).count('t_gated') == 1


def test_a_retry_is_the_same_instance(traced: Any) -> None:
    uid = traced.fire('retries', 'at once', {'amount': 99})
    found = traced.settled(uid)
    assert {name: (str(i.status), i.attempt) for name, i in found.items()} == {
        't_at_once#0': ('finished', 2)
    }
    assert traced.lines(uid) == ['attempt 0 0', 'attempt 1 1', 'attempt 2 2']
    assert traced.fired(uid) == ['at once', 't_at_once']


def test_a_running_task_that_is_terminated_is_revoked(traced: Any) -> None:
    uid = traced.fire('control', 'sleep')
    traced.wait_for(lambda: traced.lines(uid), 'the task has started')
    task_id = traced.storage(uid)['t_sleep#0'].task_id
    traced.app.control.revoke(task_id, terminate=True, destination=[traced.node])
    ended(traced, uid, sleep='revoked')
    assert traced.fired(uid) == ['sleep', 't_sleep:revoked']
