"""Situations that brokers, networks and operating systems bring about, one test for each."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest

from tests.chaos import points
from tests.chaos.arena import Arena
from tests.chaos.beside import beside
from tests.chaos.checks import cascades, everything, runs_of, unended
from tests.chaos.conftest import LONG
from tests.chaos.places import wait_for
from tests.parts.proxy import Proxy
from tests.parts.servers import AMQP, nothing_may_be_missing

KINDS = ('late', 'early', 'again')

#: What ``fire()`` may take at most while the broker is down, and what a busy machine adds.
LIMIT, SLACK = 2.0, 0.7


def starts(arena: Arena) -> Counter[tuple[str, str]]:
    """Return how often the code of each instance was started."""
    return Counter((run.uid, run.instance) for run in runs_of(arena.journal.read('executions'), []))


def each_ran_once(arena: Arena) -> None:
    again = {uid for (uid, _), number in starts(arena).items() if number != 1}
    assert not again, arena.describe(again)


def wait_until_started(arena: Arena, *uids: str, instance: str = 't_first#0') -> None:
    def all_started() -> bool:
        known = starts(arena)
        return all(known[uid, instance] for uid in uids)

    wait_for(all_started, f'{instance} of {uids} runs')


def check(arena: Arena, *uids: str) -> None:
    wait_for(lambda: not arena.dues(), 'the index of due dates is empty')
    wrong = everything(arena, uids)
    assert not wrong, '\n'.join(wrong)


def rabbit() -> str:
    """Return the URL of the RabbitMQ that others use too; skip where there is none."""
    try:
        with kombu.Connection(AMQP, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1)
    except Exception as exc:
        if nothing_may_be_missing():
            pytest.fail(f'RabbitMQ is not reachable: {exc}')
        pytest.skip(f'RabbitMQ is not reachable: {exc}')
    return AMQP


# --------------------------------------------------------------------- redelivery


@beside
def test_a_visibility_timeout_that_is_shorter_than_the_tasks(make_arena):
    """Redis gives the message of a task that still runs to another worker."""
    arena = make_arena(broker_transport_options={
        'visibility_timeout': 1, 'unacked_restore_interval': 0.3, 'unacked_restore_throttle': 1,
    })
    arena.keep_workers(2, '--concurrency', '2')
    uids = [arena.uid('chain-late') for _ in range(40 if LONG else 4)]
    arena.fire_until_acknowledged(*(arena.job(uid, 'go', {'seconds': 4}) for uid in uids))
    arena.settled(uids)
    check(arena, *uids)
    each_ran_once(arena)
    received = Counter((line['uid'], line['instance']) for line in arena.journal.read('received'))
    assert all(received[uid, 't_first#0'] > 1 for uid in uids), 'each was delivered again'


@pytest.mark.parametrize('kind', ['late', 'early'])
@pytest.mark.parametrize('broker', ['redis', 'rabbitmq'])
@beside
def test_a_worker_that_is_killed_with_four_tasks_prefetched(make_arena, broker, kind):
    """Redis keeps what a dead worker had received for an hour; the sweep does not wait."""
    url = rabbit() if broker == 'rabbitmq' else ''
    arena = make_arena(broker=url, worker_prefetch_multiplier=5)
    worker = arena.worker('--concurrency', '1')
    gate = arena.folder / 'go on'
    uids = [arena.uid(f'chain-{kind}') for _ in range(5)]
    jobs = [arena.job(uid, 'go', {'until': str(gate)}) for uid in uids]
    arena.fire_until_acknowledged(*jobs)
    wait_for(lambda: len(arena.journal.read('received')) == 5, 'all are received')
    wait_for(lambda: len(starts(arena)) == 1, 'one runs')
    ((running, _),) = starts(arena)
    arena.kill(worker, role='parent')
    arena.nursery.wait(worker)
    gate.touch()
    arena.keep_workers(1, '--concurrency', '2')
    arena.settled(uids)
    check(arena, *uids)
    for uid in uids:
        lost = uid == running and kind == 'early'
        assert arena.statuses(uid)['t_first#0'] == ('failed' if lost else 'finished')
        assert starts(arena)[uid, 't_first#0'] == 1 + (uid == running and kind == 'late')


@beside
def test_two_tasks_of_a_join_that_end_in_the_same_millisecond(make_arena):
    # Nothing is lost here, and what is sent again would only come out of order.
    arena = make_arena(triggers_redeliver_after=600)
    for suffix in ('-left', '-right', ''):
        arena.keep_workers(1, '--concurrency', '1', '--queues', arena.name + suffix)
    batch, wanted = (1000, 1000) if LONG else (50, 1)
    place = arena.folder / 'meeting'
    place.mkdir()
    uids: list[str] = []
    together = 0
    # Fewer than all of them do so, on a busy machine in particular.
    while together < wanted and len(uids) < 10 * batch:
        more = [arena.uid(f'pair-{("late", "early")[i % 2]}') for i in range(batch)]
        firings = [
            arena.job(uid, 'go', {'number': len(uids) + i, 'place': str(place)})
            for i, uid in enumerate(more)
        ]
        arena.fire_until_acknowledged(*firings)
        arena.settled(more, timeout=90 + batch / 2)
        apart = [arena.storage(uid)['t_body#0'].result['apart'] for uid in more]
        together += sum(seconds < 0.001 for seconds in apart)
        uids += more
    check(arena, *uids)
    each_ran_once(arena)
    print(f'{together} of {len(uids)} pairs ended within a millisecond')
    assert together >= wanted


# -------------------------------------------------------------------------- leases


@pytest.mark.parametrize('pool', ['prefork', 'threads', 'solo'])
@beside
def test_a_task_that_outlives_its_lease_by_far_on_a_healthy_worker(make_arena, pool):
    """Its worker's heartbeat renews it, also while the task holds the main thread."""
    arena = make_arena(triggers_lease=1.0)
    arena.worker('--pool', pool, '--concurrency', '1' if pool == 'solo' else '4', log='tested')
    plans = [{'seconds': 4}, {'compute': 4}]
    jobs = [
        arena.job(arena.uid(f'chain-{kind}'), 'go', plan)
        for kind, plan in zip(('late', 'early'), plans, strict=True)
    ]
    uids = [job['uid'] for job in jobs]
    arena.fire_until_acknowledged(*jobs)
    wait_until_started(arena, *(uids[:1] if pool == 'solo' else uids))
    # From here on somebody would take over what is not renewed.
    arena.keep_workers(1, '--concurrency', '2')
    arena.keep_sweepers(1)
    arena.settled(uids)
    check(arena, *uids)
    each_ran_once(arena)
    assert {s for uid in uids for s in arena.statuses(uid).values()} == {'finished'}


class Stopped:
    """A worker with one child, both of which are stopped in the middle of a task."""

    def __init__(self, arena: Arena):
        self.arena = arena
        self.pid = arena.worker('--concurrency', '1', log='stopped')
        wait_for(lambda: self.children, 'the worker has a child')

    @property
    def children(self) -> list[int]:
        return self.arena.nursery.children_of(self.pid)

    def stop(self) -> None:
        # The parent first, so that it sees nothing of its child's stop.
        self.arena.nursery.kill(self.pid, signal.SIGSTOP)
        for child in self.children:
            self.arena.nursery.kill_child(self.pid, child, signal.SIGSTOP)

    def go_on(self) -> None:
        for child in self.children:
            self.arena.nursery.kill_child(self.pid, child, signal.SIGCONT)
        self.arena.nursery.kill(self.pid, signal.SIGCONT)


@pytest.mark.parametrize('kind', KINDS)
@beside
def test_a_stopped_worker_that_comes_back_after_its_instance_was_given_to_another(
    make_arena, kind
):
    """Its code goes on where it stood; what it reports is stale and changes nothing."""
    arena = make_arena(triggers_lease=1.5)
    stopped = Stopped(arena)
    gate = arena.folder / 'go on'
    uid = arena.uid(f'chain-{kind}')
    arena.fire_until_acknowledged(arena.job(uid, 'go', {'until': str(gate)}))
    wait_until_started(arena, uid)
    stopped.stop()
    arena.keep_workers(1, '--concurrency', '2')
    if kind == 'early':
        wait_for(lambda: arena.statuses(uid)['t_first#0'] == 'failed', 'it is given up')
        arena.app.triggers.session(uid).replay_failed_instance('t_first#0')
    second = 't_first#0' if kind == 'late' else 't_first#1'
    wait_for(lambda: starts(arena)[uid, second] == (2 if kind == 'late' else 1), 'it runs again')
    gate.touch()
    arena.settled([uid])
    stopped.go_on()

    def all_have_ended() -> bool:
        lines = Counter(line['what'] for line in arena.journal.read('executions'))
        return lines['start'] == lines['end']

    wait_for(all_have_ended, 'the stopped code comes to its end')
    wait_for(lambda: 'succeeded in' in arena.log('stopped').read_text(), 'its worker reports it')
    arena.settled([uid])
    assert cascades(arena, uid) == unended(arena, uid) == []
    assert arena.fired(uid).count('t_first') == arena.fired(uid).count('t_second') == 1
    assert arena.statuses(uid)['t_first#0'] == ('finished' if kind == 'late' else 'replayed')
    wait_for(lambda: not arena.dues(), 'the index of due dates is empty')


@beside
def test_a_stopped_worker_that_comes_back_before_anybody_has_replayed_its_instance(make_arena):
    """The instance has failed as lost; its success arrives after all and counts."""
    arena = make_arena(triggers_lease=1.5)
    stopped = Stopped(arena)
    gate = arena.folder / 'go on'
    uid = arena.uid('chain-early')
    arena.fire_until_acknowledged(arena.job(uid, 'go', {'until': str(gate)}))
    wait_until_started(arena, uid)
    stopped.stop()
    arena.keep_workers(1, '--concurrency', '2')
    wait_for(lambda: arena.statuses(uid)['t_first#0'] == 'failed', 'it is given up')
    gate.touch()
    stopped.go_on()
    wait_for(lambda: arena.statuses(uid)['t_first#0'] == 'finished', 'the success counts')
    arena.settled([uid])
    check(arena, uid)
    assert arena.fired(uid)[:2] == ['go', 't_first:failed']
    each_ran_once(arena)


@pytest.mark.parametrize('kind', KINDS)
@beside
def test_a_worker_that_is_stopped_between_its_claim_and_the_code(make_arena, kind):
    """It looks at its claim once more before it starts, and does not start."""
    arena = make_arena(triggers_lease=1.5)
    stopped = Stopped(arena)
    uid = arena.uid(f'chain-{kind}')
    points.order(arena.folder, 'after claim', 'parent', uid, action='stop')
    arena.fire_until_acknowledged(arena.job(uid, 'go'))
    wait_for(lambda: arena.journal.read('kills'), 'it is stopped')
    arena.keep_workers(1, '--concurrency', '2')
    arena.settled([uid])
    before = starts(arena)
    stopped.go_on()
    wait_for(
        lambda: 'ignored' in arena.log('stopped').read_text(),
        'the claim is refused',
    )
    check(arena, uid)
    assert starts(arena)[uid, 't_first#0'] == before[uid, 't_first#0'] == int(kind == 'late')
    assert arena.statuses(uid)['t_first#0'] == {
        'late': 'finished', 'early': 'failed', 'again': 'replayed',
    }[kind]


@contextmanager
def _away(arena: Arena, how: str) -> Iterator[None]:
    """Keep the storage away."""
    if how == 'stopped':
        arena.store.stop(hard=False)
        yield
        arena.store.start()
    elif how == 'frozen':
        arena.store.freeze()
        yield
        arena.store.thaw()
    else:
        with sqlite3.connect(arena.folder / 'sessions.db', timeout=30) as database:
            database.execute('BEGIN EXCLUSIVE')
            yield
            database.rollback()


@pytest.mark.parametrize('how', ['stopped', 'frozen', 'locked'])
@beside
def test_the_storage_is_gone_for_longer_than_a_lease_while_healthy_tasks_run(make_arena, how):
    """Nobody could renew a lease; once it is back, nobody is judged for that."""
    # Without a result backend Celery forgets what a task returned: see the next test.
    arena = make_arena(
        triggers_lease=2.0, storage='sql' if how == 'locked' else 'redis', results_apart=True
    )
    workers = arena.keep_workers(2, '--concurrency', '3')
    # Some end during the outage, some after it.
    jobs = [
        arena.job(arena.uid(f'chain-{kind}'), 'go', {'seconds': seconds})
        for kind in ('late', 'early') for seconds in (4, 7, 11)
    ]
    uids = [job['uid'] for job in jobs]
    arena.fire_until_acknowledged(*jobs)
    wait_until_started(arena, *uids)
    time.sleep(0.5)
    with _away(arena, how):
        time.sleep(6)
    arena.settled(uids)
    check(arena, *uids)
    each_ran_once(arena)
    assert {s for uid in uids for s in arena.statuses(uid).values()} == {'finished'}
    assert workers.started == 2


@pytest.mark.parametrize('scenario', ['chain', 'failure', 'retry', 'replay'])
@beside
def test_the_storage_is_away_for_a_moment_when_tasks_end(make_arena, scenario):
    """What a task says at its end is stored once the storage is back within a lease."""
    arena = make_arena(triggers_lease=6.0, results_apart=True)
    arena.keep_workers(1, '--concurrency', '4')
    gate = arena.folder / 'go on'
    plan = {'until': str(gate), 'attempts': 1, 'replays': 1}
    uids = [arena.uid(f'{scenario}-late') for _ in range(2)]
    arena.fire_until_acknowledged(*(arena.job(uid, 'go', plan) for uid in uids))
    wait_for(lambda: len(starts(arena)) == 2 * len(uids) if scenario == 'retry'
             else len(starts(arena)) == len(uids), 'the tasks run')
    with _away(arena, 'stopped'):
        gate.touch()
        time.sleep(1)
    wait_for(lambda: not any(unended(arena, uid) for uid in uids), 'all end')
    arena.settled(dict.fromkeys(uids, plan))
    check(arena, *uids)


@beside
def test_the_result_backend_refuses_while_tasks_end(make_arena):
    """Celery then tells nobody how the task ended, or that it failed; nothing hangs.

    Code that acknowledges late may run again, other code fails as lost, and where the
    backend is back in time Celery's own verdict counts: a failure, with a ConnectionError.
    """
    arena = make_arena(triggers_lease=1.5)
    proxy = Proxy('127.0.0.1', arena.store.port)
    backend = f'redis://127.0.0.1:{proxy.port}/1'
    try:
        arena.keep_workers(1, '--concurrency', '3', backend=backend)
        uids = [arena.uid(f'chain-{kind}') for kind in KINDS]
        arena.fire_until_acknowledged(*(arena.job(uid, 'go', {'seconds': 2}) for uid in uids))
        wait_until_started(arena, *uids)
        proxy.refuse()

        def have_ended() -> bool:
            ended = {e['uid'] for e in arena.journal.read('executions') if e['what'] == 'end'}
            return ended >= set(uids)

        wait_for(have_ended, 'their code has ended')
        time.sleep(0.5)
        proxy.mend()
        wait_for(lambda: not any(unended(arena, uid) for uid in uids), 'all end')
        check(arena, *uids)
        for uid in uids:
            ends = {name: i.metadata for name, i in arena.instances(uid).items()
                    if i.status == 'failed'}
            assert all(
                facts['exception']['type'] in ('WorkerLostError', 'ConnectionError')
                for facts in ends.values()
            ), ends
    finally:
        proxy.close()


# ------------------------------------------------------------------- while firing


def _fire_while(arena: Arena, change: Callable[[], None], **settings: Any) -> list[str]:
    """Fire in a process that is connected already, and in one that is not yet.

    Returns:
        The uids of what was fired after the change.
    """
    connected = [arena.job(arena.uid('chain-late'), 'go') for _ in range(4)]
    for job in connected[1:]:
        job['pause'] = 1.5
    process = arena.fire(*connected, **settings)
    wait_for(lambda: connected[0]['id'] in arena.acknowledged(), 'the first is fired')
    change()
    fresh = [arena.job(arena.uid('chain-early'), 'go') for _ in range(3)]
    other = arena.fire(*fresh, **settings)
    assert arena.nursery.wait(process) == arena.nursery.wait(other) == 0
    jobs = [*connected[1:], *fresh]
    answers = {answer['id']: answer for answer in arena.journal.read('acks')}
    assert all(answers[job['id']]['ok'] for job in jobs), answers
    slowest = max(answers[job['id']]['seconds'] for job in jobs)
    print(f'the slowest fire() took {slowest:.2f} s')
    assert slowest < LIMIT + SLACK
    return [job['uid'] for job in [*connected, *fresh]]


@pytest.mark.parametrize(
    ('broker', 'mode'),
    [
        *(('redis', mode) for mode in ('refuse', 'silent', 'drop', 'frozen')),
        # The RabbitMQ here is shared: nobody freezes it, a silent proxy stands for that.
        *(('rabbitmq', mode) for mode in ('refuse', 'silent', 'drop')),
    ],
)
@beside
def test_the_broker_is_down_while_triggers_are_fired(make_arena, broker, mode):
    """``fire()`` neither fails nor takes long, and the sweep sends what it released."""
    arena = make_arena(broker=rabbit() if broker == 'rabbitmq' else '')
    place = urlsplit(arena.settings['broker'])
    assert place.port is not None
    proxy = Proxy(place.hostname or 'localhost', place.port)
    through = arena.settings['broker'].replace(
        f'{place.hostname}:{place.port}', f'127.0.0.1:{proxy.port}'
    )
    try:
        if mode == 'frozen':
            uids = _fire_while(arena, arena.broker.freeze)
            arena.broker.thaw()
        else:
            def cut() -> None:
                # After the handshake of the protocol, in the middle of a message.
                proxy.cut_after = 1500 if broker == 'rabbitmq' else 700


            changes = {'refuse': proxy.refuse, 'silent': proxy.freeze, 'drop': cut}
            uids = _fire_while(arena, changes[mode], broker=through)
        arena.keep_workers(1, '--concurrency', '3')
        arena.settled(uids)
        check(arena, *uids)
        each_ran_once(arena)
    finally:
        proxy.close()


@pytest.mark.parametrize('mode', ['refuse', 'silent'])
@beside
def test_the_result_backend_is_down_while_triggers_are_fired(make_arena, mode):
    """Celery tells the backend of each call, which must not hold ``fire()`` up either."""
    arena = make_arena()
    proxy = Proxy('127.0.0.1', arena.store.port)
    try:
        uids = _fire_while(
            arena, proxy.refuse if mode == 'refuse' else proxy.freeze, backend=f'redis://127.0.0.1:{proxy.port}/1',
        )
        arena.keep_workers(1, '--concurrency', '3')
        arena.settled(uids)
        check(arena, *uids)
    finally:
        proxy.close()
