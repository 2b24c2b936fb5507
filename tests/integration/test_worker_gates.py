"""Gates work wherever Celery takes a signature, in real workers."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import integration_app
import pytest
from canvas_app import Canvas
from celery import _state, chain, chord, group, states
from integration_support import PATIENCE, clean_redis

from celery_triggers import fire, gate, kwarg
from celery_triggers.exceptions import InvalidConfiguration
from tests.parts.servers import BROKER_DB, STORAGE_DB, redis_url

#: The positions of a gate: what they make, its result, how many gates wait at first.
POSITIONS: dict[str, tuple[Callable[[Canvas], Any], Any, int]] = {
    'alone': (lambda c: c.gate(c.add.s(1, 2)), 3, 1),
    'a task of another base': (lambda c: c.gate(c.foreign_add.s(1, 2)), 3, 1),
    'a task': (lambda c: c.gate(c.give), None, 1),
    'first in a chain': (lambda c: chain(c.gate(c.add.s(1, 1)), c.add.s(2), c.add.s(3)), 7, 1),
    'in the middle of a chain': (
        lambda c: chain(c.add.s(1, 1), c.gate(c.add.s(2)), c.add.s(3)), 7, 1,
    ),
    'last in a chain': (lambda c: chain(c.add.s(1, 1), c.add.s(2), c.gate(c.add.s(3))), 7, 1),
    'everywhere in a chain': (
        lambda c: chain(c.gate(c.add.s(1, 1)), c.gate(c.add.s(2)), c.gate(c.add.s(3))), 7, 1,
    ),
    'before a pipe': (lambda c: c.gate(c.add.s(1, 1)) | c.add.s(2), 4, 1),
    'after a pipe': (lambda c: c.add.s(1, 1) | c.gate(c.add.s(2)), 4, 1),
    'between pipes': (lambda c: c.add.s(1, 1) | c.gate(c.add.s(2)) | c.add.s(3), 7, 1),
    'before a group': (
        lambda c: c.gate(c.add.s(1, 1)) | group(c.add.s(1), c.add.s(2)) | c.total.s(), 7, 1,
    ),
    'after a group': (
        lambda c: group(c.add.s(1, 1), c.add.s(2, 2)) | c.gate(c.total.s()), 6, 1,
    ),
    'immutable': (lambda c: chain(c.add.s(1, 1), c.gate(c.add.si(2, 3)), c.add.s(1)), 6, 1),
    'in a group': (lambda c: group(c.add.s(1, 1), c.gate(c.add.s(2, 2))), [2, 4], 1),
    'everywhere in a group': (
        lambda c: group(c.gate(c.add.s(n, n)) for n in (1, 2, 3)), [2, 4, 6], 3,
    ),
    'in a group in a chain': (
        lambda c: c.add.s(1, 1) | group(c.add.s(1), c.gate(c.add.s(2))), [3, 4], 1,
    ),
    "in a chord's header": (
        lambda c: chord([c.add.s(1, 1), c.gate(c.add.s(2, 2))], c.total.s()), 6, 1,
    ),
    "everywhere in a chord's header": (
        lambda c: chord([c.gate(c.add.s(n, n)) for n in (1, 2, 3)], c.total.s()), 12, 3,
    ),
    "in a chain in a chord's header": (
        lambda c: chord(
            [chain(c.add.s(1, 1), c.gate(c.add.s(2)), c.add.s(3)), c.add.s(4, 4)], c.total.s()
        ), 15, 1,
    ),
    "first and last in chains in a chord's header": (
        lambda c: chord(
            [chain(c.gate(c.add.s(1, 1)), c.add.s(2)), chain(c.add.s(3, 3), c.gate(c.add.s(4)))],
            c.total.s(),
        ), 14, 2,
    ),
    "a chord's body": (
        lambda c: chord([c.add.s(1, 1), c.add.s(2, 2)], c.gate(c.total.s())), 6, 1,
    ),
    "in a chord's header and its body": (
        lambda c: chord([c.gate(c.add.s(1, 1)), c.add.s(2, 2)], c.gate(c.total.s())), 6, 1,
    ),
    "in a chain that is a chord's body": (
        lambda c: chord([c.add.s(1, 1), c.add.s(2, 2)], chain(c.total.s(), c.gate(c.add.s(1)))),
        7, 1,
    ),
    'after a chord in a chain': (
        lambda c: chain(
            c.add.s(1, 1), chord([c.add.s(1), c.gate(c.add.s(2))], c.total.s()),
            c.gate(c.add.s(3)),
        ), 10, 1,
    ),
    'in a chain in a group in a chord': (
        lambda c: chord(
            [group(chain(c.add.s(1, 1), c.gate(c.add.s(2))), c.add.s(3, 3)), c.add.s(4, 4)],
            c.total.s(),
        ), 18, 1,
    ),
    'in a chord in a chord': (
        lambda c: chord(
            [chord([c.gate(c.add.s(1, 1)), c.add.s(2, 2)], c.total.s()), c.add.s(3, 3)],
            c.total.s(),
        ), 12, 1,
    ),
    'of a gate': (lambda c: c.gate(c.gate(c.add.s(1, 2))), 3, 1),
    'of a gate in a chain': (
        lambda c: chain(c.add.s(1, 1), c.gate(c.gate(c.add.s(2))), c.add.s(3)), 7, 1,
    ),
    'of a chain': (lambda c: c.gate(chain(c.add.s(1, 1), c.add.s(2))), 4, 1),
    'of a group': (lambda c: c.gate(group(c.add.s(1, 1), c.add.s(2, 2))), [2, 4], 1),
    'of a chord': (lambda c: c.gate(chord([c.add.s(1, 1), c.add.s(2, 2)], c.total.s())), 6, 1),
    'of a chain with a gate in it': (
        lambda c: c.gate(chain(c.add.s(1, 1), c.gate(c.add.s(2)), c.add.s(3))), 7, 1,
    ),
    'of a chain that ends in a gate': (
        lambda c: c.gate(chain(c.add.s(1, 1), c.gate(c.add.s(2)))), 4, 1,
    ),
    'of a chord whose body is a gate': (
        lambda c: c.gate(chord([c.add.s(1, 1), c.add.s(2, 2)], c.gate(c.total.s()))), 6, 1,
    ),
    'in the place of a task in a gate': (
        lambda c: c.gate(c.replaced.si(c.gate(c.add.s(1, 2)))), 3, 1,
    ),
    'of a chain in a chain': (
        lambda c: chain(c.add.s(1, 1), c.gate(chain(c.add.s(2), c.add.s(3))), c.add.s(4)), 11, 1,
    ),
    'of a group in a chain': (
        lambda c: chain(c.add.s(1, 1), c.gate(group(c.add.s(2), c.add.s(3))), c.total.s()), 9, 1,
    ),
    'of a chord in a chain': (
        lambda c: chain(
            c.add.s(1, 1), c.gate(chord([c.add.s(1), c.add.s(2)], c.total.s())), c.add.s(1),
        ), 8, 1,
    ),
    "of canvases in a chord's header": (
        lambda c: chord(
            [
                c.gate(chain(c.add.s(1, 1), c.add.s(2))),
                c.gate(group(c.add.s(1, 1), c.add.s(2, 2))),
                c.gate(chord([c.add.s(1, 1), c.add.s(2, 2)], c.total.s())),
                c.add.s(5, 5),
            ],
            c.total.s(),
        ), 26, 3,
    ),
    "of a chain as a chord's body": (
        lambda c: chord([c.add.s(1, 1), c.add.s(2, 2)], c.gate(c.total.s() | c.add.s(1))), 7, 1,
    ),
    'in the place of a plain task': (
        lambda c: c.replaced.si(c.gate(c.add.s(1, 2))), 3, 1,
    ),
    'in the place of a plain task in a chain': (
        lambda c: chain(
            c.add.s(1, 1), c.replaced.si(chain(c.add.s(3, 3), c.gate(c.add.s(1)))), c.add.s(1),
        ), 8, 1,
    ),
    "in the place of a plain task in a chord's header": (
        lambda c: chord([c.replaced.si(c.gate(c.add.s(1, 2))), c.add.s(1, 1)], c.total.s()), 5, 1,
    ),
}

#: How a canvas comes to be applied, and whether before what its gates wait for is fired.
WAYS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    'before it is fired': (lambda app, canvas: canvas, True),
    'after it was fired': (lambda app, canvas: canvas, False),
    'cloned and read from JSON': (
        lambda app, canvas: app.signature(json.loads(json.dumps(canvas.clone()))), True,
    ),
    'without gates': (lambda app, canvas: canvas, True),
}


@dataclass
class Applied:
    """A canvas that was applied, and what came of it."""

    uid: str
    result: Any
    waits: int
    early: bool = False
    states: list[str] = field(default_factory=list)
    outcome: Any = None


def outcome_of(result: Any, deadline: float) -> Any:
    """Return a result or the exception that it raises, before this time."""
    try:
        return result.get(timeout=max(deadline - time.monotonic(), 0.5))
    except Exception as exc:
        return exc


def run_all(worker: Any, way: str) -> dict[str, Applied]:
    """Apply a canvas for each position in a session of its own; fire, and wait for all."""
    _, first = WAYS[way]
    applied = apply_all(worker, way)
    if first and way != 'without gates':
        let_through(worker, list(applied.values()))
    wait_for_all(applied)
    return applied


def apply_all(worker: Any, way: str) -> dict[str, Applied]:
    """Apply a canvas for each position."""
    how, first = WAYS[way]
    gated = way != 'without gates'
    applied: dict[str, Applied] = {}
    for position, (build, _, waits) in POSITIONS.items():
        uid = worker.uid('canvas')
        if not first:
            worker.app.triggers.fire(uid, 'go')
        canvas = how(worker.app, build(Canvas(worker, uid, gated=gated)))
        applied[position] = Applied(uid, canvas.apply_async(), waits if first and gated else 0)
    return applied


def wait_for_all(applied: dict[str, Applied]) -> None:
    deadline = time.monotonic() + PATIENCE
    for one in applied.values():
        one.outcome = outcome_of(one.result, deadline)


def let_through(worker: Any, applied: list[Applied]) -> None:
    """Fire into each session when its gates wait."""
    for one in applied:
        canvas = Canvas(worker, one.uid)
        canvas.wait(one.waits)
        one.states = [
            worker.app.AsyncResult(i.task_id).state for i in worker.storage(one.uid)
        ]
        one.early = one.result.ready()
        canvas.fire()


@pytest.fixture(scope='module')
def ran(worker: Any) -> Callable[[str], dict[str, Applied]]:
    """Run all positions in a way, once."""
    known: dict[str, dict[str, Applied]] = {}

    def run(way: str) -> dict[str, Applied]:
        if way not in known:
            known[way] = run_all(worker, way)
        return known[way]

    return run


@pytest.mark.parametrize('position', POSITIONS)
@pytest.mark.parametrize('way', WAYS)
def test_a_gate_stands_wherever_a_signature_does(ran, way, position):
    """Its canvas has the result that it has without gates."""
    applied = ran(way)[position]
    assert applied.outcome == POSITIONS[position][1]
    assert not applied.early
    assert set(applied.states) <= {'WAITING'}
    assert len(applied.states) == applied.waits


def is_idle(worker: Any) -> bool:
    """Tell whether a worker holds nothing, and nothing waits in its queue."""
    inspect = worker.app.control.inspect(destination=[worker.node], timeout=2)
    with worker.app.connection_for_read() as connection:
        queue = worker.app.amqp.queues[worker.name](connection.default_channel)
        queued = queue.channel.queue_declare(
            worker.name, durable=queue.durable, auto_delete=queue.auto_delete
        ).message_count
    held = [(ask() or {}).get(worker.node) for ask in (inspect.active, inspect.reserved)]
    return held == [[], []] and not queued


def test_a_gate_anywhere_outlives_the_worker_that_applied_it(broker, start_worker):
    settings = {'name': f'triggers-{uuid.uuid4().hex[:10]}', 'triggers_sweep_interval': 0.3}
    pool = ('--pool', 'prefork', '--concurrency', '2')
    first = start_worker(broker, *pool, **settings)
    applied = apply_all(first, 'before it is fired')
    for one in applied.values():
        Canvas(first, one.uid).wait(one.waits)
    first.wait_for(lambda: is_idle(first), 'all that can run has run')
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait(20)
    second = start_worker(broker, *pool, **settings)
    for one in applied.values():
        Canvas(second, one.uid).fire()
    wait_for_all(applied)
    outcomes = {position: one.outcome for position, one in applied.items()}
    assert outcomes == {position: value for position, (_, value, _) in POSITIONS.items()}


@pytest.fixture
def canvas(worker: Any) -> Canvas:
    return Canvas(worker, worker.uid('canvas'))


class TestApplying:
    def test_a_signature_has_a_method_that_makes_a_gate_of_it(self, canvas):
        made = canvas.add.s(1, 2).gate(after=['go'], uid=canvas.uid)
        delayed = made.delay()
        sent = made.clone().apply_async()
        canvas.go(waiting=2)
        assert [delayed.get(timeout=20), sent.get(timeout=20)] == [3, 3]

    def test_what_is_given_when_it_is_applied_joins_its_arguments(self, canvas):
        given = canvas.gate(canvas.echo.s(3, x=4)).apply_async((1,), {'y': 2})
        delayed = canvas.gate(canvas.echo.s(3, x=4)).delay(1, x=5)
        canvas.go(waiting=2)
        assert given.get(timeout=20) == {'args': [1, 3], 'kwargs': {'x': 4, 'y': 2}}
        assert delayed.get(timeout=20) == {'args': [1, 3], 'kwargs': {'x': 5}}

    def test_without_a_condition_it_runs_at_once_and_cascades(self, worker, canvas):
        made = gate(canvas.give.s({'n': 1}), uid=canvas.uid, trigger_name='t_gate')
        assert made.apply_async().get(timeout=20) == {'n': 1}
        assert worker.settled(canvas.uid, count=2)['t_follow#0'].result == {'n': 1}

    def test_fresh_counts_only_what_is_fired_from_then_on(self, worker, canvas):
        canvas.fire('go', {'v': 1})
        fresh = canvas.gate(canvas.give.s(kwarg('go', 'v')), fresh=True).apply_async()
        stale = canvas.gate(canvas.give.s(kwarg('go', 'v'))).apply_async()
        assert stale.get(timeout=20) == 1
        assert fresh.state == 'WAITING'
        canvas.fire('go', {'v': 2})
        assert fresh.get(timeout=20) == 2

    def test_applied_under_the_same_task_id_it_is_there_once(self, worker, canvas):
        made = canvas.gate(canvas.noted.s(canvas.uid))
        made.freeze()
        results = [made.apply_async(), made.apply_async()]
        canvas.go()
        late = made.apply_async()
        assert {r.id for r in [*results, late]} == {made.id}
        assert late.get(timeout=20) is None
        assert len(worker.settled(canvas.uid)) == 1
        assert worker.lines(canvas.uid) == ['ran']

    def test_while_it_waits_there_is_no_message(self, worker, canvas):
        waits = canvas.gate(canvas.give.s(1)).apply_async()
        assert waits.state == 'WAITING'
        assert waits.info == {'uid': canvas.uid, 'instance': f'gate:{waits.id}#0'}
        assert worker.storage(canvas.uid)[f'gate:{waits.id}#0'].record.sends == 0
        canvas.go()
        assert waits.get(timeout=20) == 1
        assert waits.state == 'SUCCESS'

    def test_a_result_that_is_ignored_is_not_stored(self, worker, canvas):
        by_task = canvas.gate(canvas.ignored.s(f'{canvas.uid} a')).apply_async()
        by_option = canvas.gate(
            canvas.noted.s(f'{canvas.uid} b', 1).set(ignore_result=True)
        ).apply_async()
        assert [by_task.state, by_option.state] == ['PENDING', 'PENDING']
        canvas.go(waiting=2)
        worker.settled(canvas.uid, count=2)
        assert worker.lines(f'{canvas.uid} a') + worker.lines(f'{canvas.uid} b') == ['ran', 'ran']
        assert [by_task.state, by_option.state] == ['PENDING', 'PENDING']


class TestCallbacks:
    def test_a_gate_is_the_callback_of_a_plain_task(self, canvas):
        sent = canvas.add.s(1, 1).apply_async(link=canvas.gate(canvas.add.s(5)))
        canvas.go()
        assert sent.get(timeout=20) == 2
        (child,) = sent.children
        assert child.get(timeout=20) == 7

    def test_a_gate_is_the_error_callback_of_a_plain_task(self, worker, canvas):
        """It is called with the id of the task that failed, as Celery calls such ones."""
        waits = canvas.gate(canvas.mourn.s(key=canvas.uid))
        sent = canvas.broken.s().on_error(waits).apply_async()
        canvas.go()
        worker.wait_for(lambda: worker.lines(canvas.uid), 'it is called')
        worker.settled(canvas.uid)
        assert worker.lines(canvas.uid) == [f'old {sent.id}']

    def test_a_gate_has_callbacks_of_its_own(self, worker, canvas):
        first, second = canvas.add.s(10), canvas.gate(canvas.add.s(20))
        waits = canvas.gate(canvas.add.s(1, 1)).apply_async(link=[first, second])
        broken = canvas.gate(canvas.broken.s()).apply_async(link_error=[
            canvas.mourn.s(key=f'{canvas.uid} a'), canvas.mourn_anew.s(key=f'{canvas.uid} b'),
        ])
        canvas.go(waiting=2)
        assert waits.get(timeout=20) == 2
        (both,) = waits.children
        assert both.get(timeout=20) == [12, 22]
        with pytest.raises(LookupError):
            broken.get(timeout=20)
        worker.wait_for(lambda: worker.lines(f'{canvas.uid} a'), 'the old one is called')
        assert worker.lines(f'{canvas.uid} a') == [f'old {broken.id}']
        assert worker.lines(f'{canvas.uid} b') == [f'new {broken.id} LookupError']

    def test_results_know_their_parents_and_children(self, worker, canvas):
        last = chain(
            canvas.add.s(1, 1), canvas.gate(canvas.add.s(2)), canvas.add.s(3)
        ).apply_async()
        canvas.go()
        assert last.get(timeout=20) == 7
        middle, first = last.parent, last.parent.parent
        assert (first.get(), middle.get(), first.parent) == (2, 4, None)
        assert [child.id for child in first.children] == [middle.id]
        assert [child.id for child in middle.children] == [last.id]
        assert list(worker.storage(canvas.uid).instances) == [f'gate:{middle.id}#0']


class TestReplacement:
    @pytest.mark.parametrize(
        ('by', 'n'), [('gate', 1), ('chain', 2), ('gated chain', 3)]
    )
    def test_a_trigger_task_ends_as_the_gate_that_took_its_place(self, worker, by, n):
        uid = worker.fire('within', 'replace', {'by': by})
        Canvas(worker, uid).wait()
        assert worker.storage(uid)['t_replaces#0'].status == 'running'
        worker.app.triggers.fire(uid, 'go')
        replaced = worker.status(uid, 't_replaces#0', 'finished')
        assert replaced.async_result.get(timeout=20) == {'n': n}
        after = worker.status(uid, 't_after_replaces#0', 'finished')
        assert after.result == {'n': n}
        worker.settled(uid, count=3)
        assert worker.fired(uid).count('t_replaces') == 1

    @pytest.mark.parametrize(
        ('by', 'type_'), [('broken gate', 'LookupError'), ('abandoned gate', 'GateAbandoned')]
    )
    def test_and_fails_with_it(self, worker, by, type_):
        uid = worker.fire('within', 'replace', {'by': by})
        Canvas(worker, uid).go()
        after = worker.status(uid, 't_after_failure#0', 'finished')
        assert after.result['type'] == type_
        assert worker.storage(uid)['t_replaces#0'].status == 'failed'
        assert worker.fired(uid).count('t_replaces:failed') == 1


class TestOptions:
    def test_queue_priority_and_expiry_reach_the_message(self, worker, canvas):
        options = {'queue': f'{worker.name}-other', 'priority': 3, 'expires': 600}
        alone = canvas.gate(canvas.request.s().set(**options)).apply_async()
        later = chain(
            canvas.give.s(1), canvas.gate(canvas.request.s()).set(**options)
        ).apply_async()
        canvas.go(waiting=2)
        for sent in (alone, later):
            found = sent.get(timeout=20)
            assert (found['queue'], found['priority']) == (f'{worker.name}-other', 3)
            assert found['expires'] is not None
            assert found['id'] == found['correlation_id'] == sent.id

    def test_it_has_the_root_and_the_parent_that_it_has_without_gates(self, canvas):
        last = chain(
            canvas.give.s(1), canvas.gate(canvas.request.s()), canvas.gate(canvas.request.s())
        ).apply_async()
        canvas.go()
        last.get(timeout=20)
        first, middle = last.parent.parent, last.parent
        for result, parent in ((middle, first), (last, middle)):
            assert result.result['root_id'] == first.id
            assert result.result['parent_id'] == parent.id

    def test_stamps_arrive_in_its_request(self, canvas):
        alone = canvas.gate(canvas.request.s())
        alone.stamp(order='42')
        whole = chain(canvas.give.s(1), canvas.gate(canvas.request.s()))
        whole.stamp(order='42')
        members = group(canvas.gate(canvas.request.s()), canvas.gate(canvas.request.s()))
        members.stamp(order='42')
        plain = canvas.request.s()
        plain.stamp(order='42')
        applied = [
            one.apply_async() for one in (alone, whole, members, canvas.gate(plain), plain)
        ]
        canvas.go(waiting=5)
        found = [one.get(timeout=20) for one in applied]
        for request in [found[0], found[1], *found[2], *found[3:]]:
            assert request['stamps'] == {'order': '42'}

    def test_a_countdown_begins_when_it_is_released(self, canvas):
        inner = canvas.gate(canvas.request.s().set(countdown=1)).apply_async()
        outer = canvas.gate(canvas.request.s()).apply_async(countdown=1)
        linked = chain(
            canvas.give.s(1), canvas.gate(canvas.request.s()).set(countdown=1)
        ).apply_async()
        canvas.wait(3)
        fired = time.time()
        canvas.fire()
        for sent in (inner, outer, linked):
            assert sent.get(timeout=20)['at'] >= fired + 0.9


class TestPlaceholders:
    def test_what_was_fired_stands_in_their_place_at_any_depth(self, canvas):
        v, w = kwarg('go', 'v'), kwarg('go', 'w')
        alone = canvas.gate(
            canvas.echo.s(v, [1, {'deep': [w]}], x=v, y={'z': [w, {'u': v}]})
        ).apply_async()
        linked = chain(canvas.give.s(0), canvas.gate(canvas.echo.s(v))).apply_async()
        whole = canvas.gate(
            chain(canvas.add.s(1, v), canvas.echo.s({'w': w}))
        ).apply_async()
        joined = canvas.gate(
            chord([canvas.add.s(1, v), canvas.add.s(2, v)], canvas.echo.s(w))
        ).apply_async()
        canvas.go(waiting=4, v=7, w='seven')
        assert alone.get(timeout=20) == {
            'args': [7, [1, {'deep': ['seven']}]],
            'kwargs': {'x': 7, 'y': {'z': ['seven', {'u': 7}]}},
        }
        assert linked.get(timeout=20) == {'args': [0, 7], 'kwargs': {}}
        assert whole.get(timeout=20) == {'args': [8, {'w': 'seven'}], 'kwargs': {}}
        assert joined.get(timeout=20) == {'args': [[8, 9], 'seven'], 'kwargs': {}}

    def test_those_of_a_gate_in_a_gate_are_its_own(self, canvas):
        sent = canvas.gate(
            chain(
                canvas.give.s(kwarg('go', 'v')),
                canvas.gate(canvas.echo.s(kwarg('more', 'v')), after=['more']),
            )
        ).apply_async()
        canvas.go(v=1)
        canvas.wait()
        canvas.fire('more', {'v': 2})
        assert sent.get(timeout=20) == {'args': [1, 2], 'kwargs': {}}

    def test_a_previous_result_that_looks_like_one_is_passed_on_untouched(self, canvas):
        looks = {'$kwarg': ['go', 'v']}
        sent = [
            chain(canvas.give.s(looks), canvas.gate(canvas.echo.s(1))).apply_async(),
            chain(canvas.give.s([looks]), canvas.gate(canvas.echo.s() | canvas.give.s()))
            .apply_async(),
            canvas.gate(canvas.echo.s()).apply_async((looks,)),
        ]
        canvas.go(waiting=3, v=7)
        assert [one.get(timeout=20)['args'] for one in sent] == [[looks, 1], [[looks]], [looks]]


class TestSessions:
    def test_in_a_trigger_task_a_gate_is_of_the_same_session(self, worker):
        uid = worker.fire('within', 'apply')
        made = worker.status(uid, 't_applies#0', 'finished').result
        Canvas(worker, uid).go(waiting=2)
        assert worker.app.AsyncResult(made['alone']).get(timeout=20) == 2
        assert worker.app.AsyncResult(made['chain']).get(timeout=20) == 3
        assert set(worker.settled(uid, count=3)) == {
            't_applies#0', f'gate:{made["alone"]}#0', 't_linked#0',
        }

    def test_without_any_it_is_of_the_session_of_the_root(self, worker, canvas):
        add = canvas.add
        alone = gate(add.s(1, 1), after=['go']).apply_async()
        linked = chain(add.s(1, 1), add.s(1), gate(add.s(1), after=['go'])).apply_async()
        for result, root in ((alone, alone.id), (linked, linked.parent.parent.id)):
            Canvas(worker, root).go()
            result.get(timeout=20)
            (instance,) = worker.settled(root).values()
            assert (instance.task_id, instance.status) == (result.id, 'finished')
            assert worker.app.triggers.delete(root)

    def test_its_end_cascades_into_the_trigger_tasks_of_its_session(self, worker, canvas):
        sent = chain(
            canvas.give.s({'n': 3}), canvas.gate(canvas.give.s(), trigger_name='t_gate')
        ).apply_async()
        canvas.go()
        assert sent.get(timeout=20) == {'n': 3}
        found = worker.settled(canvas.uid, count=2)
        assert found['t_gate#0'].task_id == sent.id
        assert found['t_follow#0'].result == {'n': 3}
        assert worker.fired(canvas.uid) == ['go', 't_gate', 't_follow']

    def test_gates_of_one_name_are_numbered(self, worker, canvas):
        sent = [
            canvas.gate(canvas.give.s(n), trigger_name='t_gate').apply_async() for n in (0, 1)
        ]
        canvas.go(waiting=2)
        assert [one.get(timeout=20) for one in sent] == [0, 1]
        found = worker.settled(canvas.uid, count=3)
        assert [found[f't_gate#{n}'].task_id for n in (0, 1)] == [one.id for one in sent]
        assert worker.fired(canvas.uid).count('t_gate') == 2

    def test_the_name_of_a_trigger_task_of_the_session_is_taken(self, canvas):
        with pytest.raises(InvalidConfiguration, match='give the gate another'):
            canvas.gate(canvas.give.s(), trigger_name='t_follow').apply_async()


class TestTasksInCode:
    def test_in_a_chain_they_receive_their_context_and_the_previous_result(self, canvas):
        """And the arguments of their signature, with what was fired in them."""
        task, in_class = canvas.with_context, canvas.in_class
        previous = [
            chain(canvas.give.s('before'), canvas.gate(task.s())).apply_async(),
            chain(canvas.give.s('before'), canvas.gate(task.s(1, x=kwarg('go', 'v'))))
            .apply_async(),
            canvas.gate(task.s(x=2)).apply_async(),
            chord([canvas.give.s(1), canvas.give.s(2)], canvas.gate(task.s())).apply_async(),
            chain(canvas.give.s('before'), canvas.gate(task.si())).apply_async(),
        ]
        class_based = chain(canvas.give.s(5), canvas.gate(in_class.s(times=2))).apply_async()
        canvas.go(waiting=6, v=7)
        found = [one.get(timeout=20) for one in previous]
        assert [one['previous'] for one in found] == [['before'], ['before', 1], [], [[1, 2]], []]
        assert [one['kwargs'] for one in found] == [{}, {'x': 7}, {'x': 2}, {}, {}]
        assert all(one['fired'] == {'go': {'v': 7}} for one in found)
        assert all(one['uid'] == canvas.uid for one in found)
        assert class_based.get(timeout=20) == {'fired': {'go': {'v': 7}}, 'times': [5, 5]}

    def test_a_plain_task_in_a_gate_finds_its_context(self, canvas):
        sent = canvas.gate(canvas.where.s()).apply_async()
        canvas.go()
        assert sent.get(timeout=20) == [canvas.uid, f'gate:{sent.id}#0']


class TestAndEvery:
    def test_each_firing_sends_a_copy_with_an_id_of_its_own(self, worker, canvas):
        template = canvas.gate(
            canvas.echo.s(kwarg('scan', 'box'), kwarg('go', 'v')), and_every='scan',
            trigger_name='t_scan',
        ).apply_async()
        for box in (1, 2):
            canvas.fire('scan', {'box': box})
        canvas.fire('go', {'v': 'x'})
        canvas.fire('scan', {'box': 3})
        found = worker.settled(canvas.uid, count=4)
        copies = [i for i in found.values() if i.status == 'finished']
        assert [i.result['args'] for i in copies] == [[1, 'x'], [2, 'x'], [3, 'x']]
        assert len({template.id, *(i.task_id for i in copies)}) == 4
        assert template.state == 'WAITING'
        assert worker.fired(canvas.uid).count('t_scan') == 3

    def test_it_is_refused_where_it_would_be_part_of_a_canvas(self, canvas):
        every = canvas.gate(canvas.total.s(), and_every='scan')
        add = canvas.add
        canvases = [
            chain(every, add.s(1)), chain(add.s(1, 1), every), group(every, add.s(1, 1)),
            chain(add.s(1, 1), every, add.s(1)), chord([every, add.s(1, 1)], canvas.total.s()),
            chord([add.s(1, 1), add.s(1, 1)], every),
            chord([chain(add.s(1, 1), every), add.s(1, 1)], canvas.total.s()),
        ]
        for one in canvases:
            with pytest.raises(InvalidConfiguration, match='cannot be part of a chain'):
                one.apply_async()

    def test_a_task_that_replaces_itself_by_one_fails(self, canvas):
        every = canvas.gate(canvas.add.s(1, 1), and_every='scan')
        sent = canvas.replaced.s(every).apply_async()
        with pytest.raises(InvalidConfiguration, match='nor replace a task'):
            sent.get(timeout=20)


@pytest.fixture
def current(worker: Any) -> Iterator[None]:
    """Make the application current, as one that is alone in its process is."""
    before = _state._tls.current_app
    worker.app.set_current()
    yield
    _state._set_current_app(before)


@pytest.mark.usefixtures('current')
class TestFire:
    @pytest.mark.parametrize(
        ('previous', 'fired'), [({'n': 1}, {'n': 1}), (None, {}), (5, {'result': 5})]
    )
    def test_the_previous_result_is_what_is_fired(self, worker, canvas, previous, fired):
        sent = chain(canvas.give.s(previous), fire.s(canvas.uid, 'go')).apply_async()
        waits = canvas.gate(canvas.with_context.s()).apply_async()
        assert sent.get(timeout=20) == fired
        assert waits.get(timeout=20)['fired'] == {'go': fired}

    def test_kwargs_of_its_own_stand_under_it(self, worker, canvas):
        own = {'a': 1, 'b': 1}
        both = chain(canvas.give.s({'b': 2}), fire.s(canvas.uid, 'go', own)).apply_async()
        alone = chain(canvas.give.s({'b': 2}), fire.si(canvas.uid, 'go', own)).apply_async()
        assert both.get(timeout=20) == {'a': 1, 'b': 2}
        assert alone.get(timeout=20) == own

    def test_in_a_group_and_as_a_callback(self, worker, canvas):
        sent = canvas.give.s({'n': 1}).apply_async(link=fire.s(canvas.uid, 'go'))
        joined = chord(
            [canvas.give.s(1), canvas.give.s(2)], fire.s(canvas.uid, 'joined')
        ).apply_async()
        assert sent.get(timeout=20) == {'n': 1}
        assert joined.get(timeout=20) == {'result': [1, 2]}
        worker.wait_for(
            lambda: sorted(worker.fired(canvas.uid)) == ['go', 'joined'], 'both are fired'
        )

    def test_another_language_sends_it_by_its_name(self, worker, canvas):
        sent = worker.app.send_task('celery_triggers.fire', args=[canvas.uid, 'go', {'n': 1}])
        assert sent.get(timeout=20) == {'n': 1}
        assert worker.storage(canvas.uid).latest_kwargs['go'] == {'n': 1}

    def test_a_message_that_comes_twice_fires_once(self, worker, canvas):
        for _ in range(2):
            worker.app.send_task(
                'celery_triggers.fire', args=[canvas.uid, 'go'], task_id=canvas.uid
            ).get(timeout=20)
        given = chain(
            canvas.give.s(), fire.s(canvas.uid, 'more', event_id='e')
        )
        for _ in range(2):
            given.apply_async().get(timeout=20)
        assert worker.fired(canvas.uid) == ['go', 'more']

    def test_called_it_says_what_to_call_instead(self):
        with pytest.raises(TypeError, match=r'app\.triggers\.fire\('):
            fire('order:42', 'paid')


def test_workers_may_die_while_a_gate_waits(broker, start_worker):
    """Also one that has applied a gate and not acknowledged what came before: that runs again."""
    name = f'triggers-{uuid.uuid4().hex[:10]}'
    settings: dict[str, Any] = {'name': name, 'triggers_sweep_interval': 0.3}
    if broker.startswith('redis'):
        settings['broker_transport_options'] = {
            'global_keyprefix': f'{name}:', 'visibility_timeout': 1,
        }
    first = start_worker(broker, '--pool', 'prefork', '--concurrency', '2', **settings)
    canvas = Canvas(first, first.uid('canvas'))
    last = chain(
        canvas.add.s(1, 1), canvas.gate(canvas.add.s(2)), canvas.noted_last.s(canvas.uid)
    ).apply_async()
    revoked = canvas.gate(canvas.noted.s(f'{canvas.uid} revoked')).apply_async()
    canvas.wait(2)
    revoked.revoke()
    first.wait_for(lambda: revoked.state == states.REVOKED, 'it is revoked')
    key = f'{canvas.uid} successor'
    repeated = chain(
        canvas.dying.s(key),
        group(
            canvas.gate(canvas.noted_last.s(key), after=['soon']),
            canvas.gate(canvas.noted_last.s(key), after=['late']),
        ),
    ).apply_async()
    assert first.process.wait(20) == -signal.SIGKILL
    assert len(first.storage(canvas.uid).get_unresolved_instances()) == 4
    canvas.fire('soon')

    second = start_worker(broker, '--pool', 'prefork', '--concurrency', '2', **settings)

    def comes_again() -> bool:
        if broker.startswith('redis'):
            with second.app.connection_for_read() as connection:
                connection.default_channel.qos.restore_visible()
        return second.lines(f'{key} predecessor') == ['ran', 'ran']

    second.wait_for(comes_again, 'the predecessor runs again')
    assert repeated.results[0].get(timeout=20) == key
    canvas.fire('late')
    canvas.fire('go')
    assert repeated.get(timeout=20) == [key, key]
    assert last.get(timeout=20) == 4
    second.barrier()
    assert second.lines(key) == ['ran', 'ran']
    assert second.lines(canvas.uid) == ['ran']
    assert second.lines(f'{canvas.uid} revoked') == []
    assert revoked.state == states.REVOKED
    statuses = sorted(str(i.status) for i in second.settled(canvas.uid, count=4).values())
    assert statuses == ['finished', 'finished', 'finished', 'revoked']


class TestResultBackends:
    @pytest.fixture(autouse=True)
    def warnings(self, monkeypatch, caplog):
        """Let each test see what is said once in a process."""
        monkeypatch.setattr('celery_triggers.canvas.applying._warned', set())
        return caplog

    def test_a_chord_is_joined_although_the_results_of_its_header_have_expired(
        self, redis_server, start_worker, warnings
    ):
        """Where its join does not expire. The state of what waits lasts too."""
        worker = start_worker(
            redis_url(BROKER_DB), '--pool', 'solo', result_expires=2, result_chord_expires=0,
            triggers_sweep_interval=0.3,
        )
        canvas = Canvas(worker, worker.uid('canvas'))
        joined = chord(
            [canvas.give.s(1), canvas.gate(canvas.give.s(2))], canvas.total.s()
        ).apply_async()
        quick, waits = joined.parent.results
        worker.wait_for(lambda: quick.state == states.SUCCESS, 'the quick one has run')
        worker.wait_for(
            lambda: worker.app.AsyncResult(quick.id).state == states.PENDING, 'it is forgotten'
        )
        assert waits.state == 'WAITING'
        canvas.fire()
        result = worker.app.AsyncResult(joined.id)
        worker.wait_for(lambda: result.state == states.SUCCESS, 'the body runs')
        assert result.get() == 3
        assert not [r for r in warnings.records if 'forgets' in r.getMessage()]
        worker.stop()

    @pytest.mark.parametrize(
        ('chord_expires', 'within', 'warned'),
        [(None, None, True), (2, 600, True), (0, None, False), (60, 30, False)],
    )
    def test_it_is_said_where_the_join_does_not_last(
        self, redis_server, warnings, chord_expires, within, warned
    ):
        name = f'triggers-{uuid.uuid4().hex[:10]}'
        app = integration_app.create(
            broker=redis_url(BROKER_DB), redis_url=redis_url(STORAGE_DB), name=name,
            result_expires=2, result_chord_expires=chord_expires,
        )
        add = app.tasks['canvas.add']
        waits = gate(add.s(1, 1), after=['go'], uid='canvas:x', within=within)
        chord([waits, waits.clone()], app.tasks['canvas.total'].s()).apply_async()
        said = [r for r in warnings.records if 'result_chord_expires' in r.getMessage()]
        assert len(said) == warned
        app.close()
        clean_redis(name)

    def test_on_a_database_gates_work_and_celery_polls(
        self, redis_server, start_worker, warnings, tmp_path
    ):
        worker = start_worker(
            redis_url(BROKER_DB), '--pool', 'solo', triggers_sweep_interval=0.3,
            canvas_result_backend=f'db+sqlite:///{tmp_path}/results.db',
            result_chord_retry_interval=0.2,
        )
        canvas = Canvas(worker, worker.uid('canvas'))
        last = chain(
            canvas.add.s(1, 1), canvas.gate(canvas.add.s(2)), canvas.add.s(3)
        ).apply_async()
        joined = chord(
            [canvas.give.s(1), canvas.gate(canvas.give.s(2))], canvas.total.s()
        ).apply_async()
        ended = chord(
            [canvas.give.s(1), canvas.gate(canvas.give.s(2), after=['never'], unless=['go'])],
            canvas.total.s(),
        ).apply_async()
        canvas.wait(3)
        assert last.parent.state == 'WAITING'
        canvas.fire()
        assert last.get(timeout=20, interval=0.1) == 7
        assert worker.app.AsyncResult(joined.id).get(timeout=20, interval=0.1) == 3
        with pytest.raises(Exception, match='unless: go'):
            worker.app.AsyncResult(ended.id).get(timeout=20, interval=0.1)
        said = [r.getMessage() for r in warnings.records if 'chord_unlock' in r.getMessage()]
        assert len(said) == 1
        assert 'DatabaseBackend cannot join by itself' in said[0]
        worker.stop()
