"""A gate that does not run, or fails, ends its result: nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from canvas_app import Canvas
from celery import chain, chord, states
from celery.exceptions import ChordError, TaskRevokedError

from celery_triggers import kwarg
from celery_triggers.exceptions import GateAbandoned, GateExpired


@pytest.fixture(scope='module')
def quick(broker: str, redis_server: str, start_worker: Any) -> Iterator[Any]:
    """A worker that looks often at what is due."""
    worker = start_worker(
        broker, '--pool', 'prefork', '--concurrency', '2', triggers_sweep_interval=0.3
    )
    yield worker
    worker.stop()


@pytest.fixture
def canvas(quick: Any) -> Canvas:
    return Canvas(quick, quick.uid('canvas'))


def cancel(worker: Any, uid: str, task_id: str) -> None:
    worker.app.triggers.session(uid).cancel('closed')


def delete(worker: Any, uid: str, task_id: str) -> None:
    worker.app.triggers.delete(uid)


def forbid(worker: Any, uid: str, task_id: str) -> None:
    worker.app.triggers.fire(uid, 'stop')


def revoke(worker: Any, uid: str, task_id: str) -> None:
    worker.app.AsyncResult(task_id).revoke()


def wait(worker: Any, uid: str, task_id: str) -> None:
    """Do nothing: its deadline comes."""


def by_hand(worker: Any, uid: str, task_id: str) -> None:
    worker.app.triggers.session(uid).update_instance_status('t_gate#0', 'abandoned')


def go_without_value(worker: Any, uid: str, task_id: str) -> None:
    worker.app.triggers.fire(uid, 'go', {'other': 1})


#: What ends a gate, the error of its result, the reason, the status, what it fires.
ENDS: dict[str, tuple[Callable[..., None], type[Exception], str, str, str]] = {
    'unless': (forbid, GateAbandoned, 'unless: stop', 'abandoned', 'abandoned'),
    'deadline': (wait, GateExpired, 'deadline', 'abandoned', 'expired'),
    'cancel': (cancel, GateAbandoned, 'cancelled: closed', 'abandoned', 'abandoned'),
    'delete': (delete, GateAbandoned, 'cancelled: deleted', '', ''),
    'revoke': (revoke, TaskRevokedError, 'revoked', 'revoked', 'revoked'),
    'by hand': (by_hand, GateAbandoned, 'by hand', 'abandoned', 'abandoned'),
    'dispatch': (go_without_value, GateAbandoned, 'cannot be dispatched', 'failed', 'failed'),
}


def waiting_gate(canvas: Canvas, sig: Any, end: str) -> Any:
    """Return a gate of a signature that this will end, with both kinds of error callbacks."""
    made = canvas.gate(
        sig, after=['go', 'more'] if end != 'dispatch' else ['go'], unless=['stop'],
        within=0.4 if end == 'deadline' else None, trigger_name='t_gate',
    )
    made.link_error(canvas.mourn.s(key=f'{canvas.uid} old'))
    made.link_error(canvas.mourn_anew.s(key=f'{canvas.uid} new'))
    return made


def mourned(worker: Any, canvas: Canvas, task_id: str, kind: str) -> None:
    """Wait until both error callbacks were called; each is called once."""
    def both() -> bool:
        return all(worker.lines(f'{canvas.uid} {style}') for style in ('old', 'new'))

    worker.wait_for(both, 'the error callbacks are called')
    worker.barrier()
    assert worker.lines(f'{canvas.uid} old') == [f'old {task_id}']
    assert worker.lines(f'{canvas.uid} new') == [f'new {task_id} {kind}']


def result_in_the_end(worker: Any, task_id: str) -> Any:
    """Return the result of a task that had failed before."""
    worker.wait_for(
        lambda: worker.app.AsyncResult(task_id).state == states.SUCCESS, f'{task_id} has a result'
    )
    return worker.app.AsyncResult(task_id).get()


@pytest.mark.parametrize('end', ENDS)
class TestEnds:
    def test_alone(self, quick, canvas, end):
        """Its result is an error that says why; its error callbacks are called once."""
        do, error, reason, status, outcome = ENDS[end]
        sent = waiting_gate(canvas, canvas.noted.s(canvas.uid, kwarg('go', 'v')), end)
        result = sent.apply_async()
        assert result.state == 'WAITING'
        do(quick, canvas.uid, result.id)
        with pytest.raises(error, match=reason) as caught:
            result.get(timeout=20)
        if error is not TaskRevokedError:
            exc = caught.value
            assert (exc.uid, exc.instance) == (canvas.uid, 't_gate#0')
            assert exc.reason == reason
            assert exc.missing == ([] if end == 'dispatch' else ['go', 'more'])
        assert result.state == (states.REVOKED if end == 'revoke' else states.FAILURE)
        mourned(quick, canvas, result.id, error.__name__)
        assert quick.lines(canvas.uid) == []
        if end == 'delete':
            assert not quick.storage(canvas.uid).exists
            return
        instance = quick.storage(canvas.uid)['t_gate#0']
        assert (instance.status, instance.metadata['reason']) == (status, reason)
        assert quick.fired(canvas.uid).count(f't_gate:{outcome}') == 1
        follower = quick.settled(canvas.uid, count=2)[f't_follow_{outcome}#0']
        if end == 'cancel':
            assert follower.status == 'abandoned', 'nothing is released in a cancelled session'
        else:
            assert follower.result['instance'] == 't_gate#0'

    def test_in_a_chain_the_rest_fails_with_it(self, quick, canvas, end):
        do, error, *_ = ENDS[end]
        last = chain(
            canvas.give.s(1), waiting_gate(canvas, canvas.echo.s(kwarg('go', 'v')), end),
            canvas.echo.s(), canvas.gate(canvas.echo.s()), canvas.noted_last.s(canvas.uid),
        ).apply_async()
        gated = last.parent.parent.parent
        quick.status(canvas.uid, 't_gate#0', 'unstarted', 'abandoned')
        do(quick, canvas.uid, gated.id)
        with pytest.raises(error):
            last.get(timeout=20)
        for one in (last, last.parent, last.parent.parent, gated):
            state = states.REVOKED if end == 'revoke' else states.FAILURE
            quick.wait_for(lambda one=one, state=state: one.state == state, f'{one} has {state}')
        mourned(quick, canvas, gated.id, error.__name__)
        assert quick.lines(canvas.uid) == []

    def test_in_the_header_of_a_chord_its_body_fails(self, quick, canvas, end):
        """As Celery's chords fail: its error callback is called, and its result raises."""
        do, error, *_ = ENDS[end]
        body = canvas.noted.si(canvas.uid)
        body.link_error(canvas.mourn.s(key=f'{canvas.uid} body'))
        joined = chord(
            [canvas.give.s(1), waiting_gate(canvas, canvas.echo.s(kwarg('go', 'v')), end)], body
        ).apply_async()
        gated = joined.parent.results[1]
        quick.status(canvas.uid, 't_gate#0', 'unstarted', 'abandoned')
        do(quick, canvas.uid, gated.id)
        with pytest.raises(error):
            joined.get(timeout=20)
        with pytest.raises(ChordError):
            quick.app.AsyncResult(joined.id).get(timeout=20)
        with pytest.raises(error):
            gated.get(timeout=20)
        quick.wait_for(lambda: quick.lines(f'{canvas.uid} body'), "the body's callback is called")
        mourned(quick, canvas, gated.id, error.__name__)
        assert len(quick.lines(f'{canvas.uid} body')) == 1
        assert quick.lines(canvas.uid) == []

    def test_as_the_body_of_a_chord(self, quick, canvas, end):
        do, error, *_ = ENDS[end]
        joined = chord(
            [canvas.give.s(1), canvas.give.s(2)],
            waiting_gate(canvas, canvas.echo.s(kwarg('go', 'v')), end),
        ).apply_async()
        quick.status(canvas.uid, 't_gate#0', 'unstarted', 'abandoned')
        do(quick, canvas.uid, joined.id)
        with pytest.raises(error):
            joined.get(timeout=20)
        mourned(quick, canvas, joined.id, error.__name__)

    def test_of_a_canvas(self, quick, canvas, end):
        do, error, *_ = ENDS[end]
        inner = chain(canvas.echo.s(kwarg('go', 'v')), canvas.noted_last.s(canvas.uid))
        last = chain(
            canvas.give.s(1), waiting_gate(canvas, inner, end), canvas.echo.s()
        ).apply_async()
        quick.status(canvas.uid, 't_gate#0', 'unstarted', 'abandoned')
        do(quick, canvas.uid, last.parent.id)
        with pytest.raises(error):
            last.get(timeout=20)
        mourned(quick, canvas, last.parent.id, error.__name__)
        assert quick.lines(canvas.uid) == []


class TestRevocation:
    def test_it_stays_revoked_when_it_is_fired_and_sends_no_message(self, quick, canvas):
        waits = canvas.gate(canvas.noted.s(canvas.uid), trigger_name='t_gate').apply_async()
        waits.revoke()
        revoked = quick.status(canvas.uid, 't_gate#0', 'revoked')
        canvas.fire()
        with pytest.raises(TaskRevokedError):
            waits.get(timeout=20)
        quick.barrier()
        assert waits.state == states.REVOKED
        assert quick.storage(canvas.uid)['t_gate#0'].status == 'revoked'
        assert f'canvas.noted[{revoked.task_id}] received' not in quick.log
        assert quick.lines(canvas.uid) == []

    def test_revoked_before_it_is_applied(self, quick, canvas):
        waits = canvas.gate(canvas.noted.s(canvas.uid), trigger_name='t_gate')
        waits.freeze()
        quick.app.control.revoke(waits.id)
        quick.wait_for(lambda: waits.id in quick.revoked(), 'the worker knows')
        result = waits.apply_async()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=20)
        assert quick.status(canvas.uid, 't_gate#0', 'revoked')
        canvas.fire()
        quick.barrier()
        assert quick.lines(canvas.uid) == []

    def test_it_can_be_replayed(self, quick, canvas):
        last = chain(
            canvas.give.s(1), canvas.gate(canvas.add.s(1), trigger_name='t_gate'), canvas.add.s(1)
        ).apply_async()
        quick.status(canvas.uid, 't_gate#0', 'unstarted')
        quick.app.triggers.session(canvas.uid).update_instance_status('t_gate#0', 'revoked')
        with pytest.raises(TaskRevokedError):
            last.get(timeout=20)
        quick.app.triggers.session(canvas.uid).replay_failed_instance('t_gate#0')
        assert quick.status(canvas.uid, 't_gate#1', 'finished').task_id == last.parent.id
        assert result_in_the_end(quick, last.id) == 3


class TestFailure:
    def test_a_task_that_raises_fails_the_gate_like_any_task(self, quick, canvas):
        last = chain(
            canvas.give.s(1), waiting_gate(canvas, canvas.broken.s(), 'dispatch'), canvas.add.s(1)
        ).apply_async()
        canvas.go()
        with pytest.raises(LookupError, match='broken'):
            last.get(timeout=20)
        mourned(quick, canvas, last.parent.id, 'LookupError')
        failed = quick.storage(canvas.uid)['t_gate#0']
        assert (failed.status, failed.metadata['reason']) == ('failed', 'raised')
        assert quick.fired(canvas.uid).count('t_gate:failed') == 1

    @pytest.mark.parametrize('times', [1, 2])
    def test_replayed_it_is_sent_under_the_same_task_id_with_the_rest(self, quick, canvas, times):
        last = chain(
            canvas.give.s(5),
            canvas.gate(canvas.broken_at_first.s(canvas.uid, times), trigger_name='t_gate'),
            canvas.add.s(1), canvas.gate(canvas.add.s(1), after=['later']),
        ).apply_async()
        canvas.go()
        session = quick.app.triggers.session(canvas.uid)
        gated = last.parent.parent
        for number in range(times):
            failed = quick.status(canvas.uid, f't_gate#{number}', 'failed')
            session.replay_failed_instance(failed)
        replayed = quick.status(canvas.uid, f't_gate#{times}', 'finished')
        assert (replayed.task_id, replayed.depth) == (gated.id, times)
        canvas.wait()
        canvas.fire('later')
        assert result_in_the_end(quick, last.id) == 7
        assert quick.app.AsyncResult(gated.id).get() == 5
        assert quick.fired(canvas.uid).count('t_gate') == 1

    def test_skipped_by_hand_its_result_is_nothing(self, quick, canvas):
        waits = canvas.gate(canvas.noted.s(canvas.uid), trigger_name='t_gate').apply_async()
        joined = chord([canvas.give.s(1), canvas.gate(canvas.give.s(2))], canvas.echo.s())
        joined = joined.apply_async()
        quick.wait_for(lambda: len(quick.storage(canvas.uid).instances) == 2, 'both wait')
        session = quick.app.triggers.session(canvas.uid)
        for name in list(session.storage.instances):
            session.update_instance_status(name, 'skipped')
        assert waits.get(timeout=20) is None
        assert joined.get(timeout=20)['args'] == [[1, None]]
        assert quick.lines(canvas.uid) == []


class TestMoods:
    """What a trigger task in code says of itself holds in a gate too."""

    def apply(self, canvas: Canvas, mood: str) -> Any:
        gated = canvas.gate(canvas.moody.s(mood), trigger_name='t_gate')
        joined = chord(
            [chain(canvas.give.s(1), gated), canvas.give.s(9)], canvas.echo.s()
        ).apply_async()
        canvas.go(v=1)
        return joined

    def test_a_retry_is_of_the_same_instance(self, quick, canvas):
        joined = self.apply(canvas, 'retry')
        assert joined.get(timeout=20)['args'] == [[[1, 1], 9]]
        instance = quick.status(canvas.uid, 't_gate#0', 'finished')
        assert instance.attempt == 1
        assert quick.lines(canvas.uid) == ['retry 0 t_gate#0', 'retry 1 t_gate#0']

    def test_a_replay_has_the_same_task_id_and_whoever_waits_gets_its_result(self, quick, canvas):
        joined = self.apply(canvas, 'replay')
        assert joined.get(timeout=20)['args'] == [[[1, 2], 9]]
        found = quick.settled(canvas.uid, count=3)
        assert (found['t_gate#0'].status, found['t_gate#1'].status) == ('replayed', 'finished')
        assert found['t_gate#0'].task_id == found['t_gate#1'].task_id
        assert quick.lines(canvas.uid) == ['replay 0 t_gate#0', 'replay 0 t_gate#1']

    def test_a_skip_gives_those_who_wait_nothing(self, quick, canvas):
        joined = self.apply(canvas, 'skip')
        assert joined.get(timeout=20)['args'] == [[None, 9]]
        skipped = quick.status(canvas.uid, 't_gate#0', 'skipped')
        assert skipped.metadata['because'] == 'closed'
        assert 't_gate' not in quick.fired(canvas.uid)
