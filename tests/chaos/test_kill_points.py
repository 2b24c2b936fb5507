"""SIGKILL at every named point, in every kind of process, on Redis and on SQL.

Each test orders kills for many sessions at once, lets workers, sweepers and firing processes
run into them, lets everything heal, and then looks from outside at what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import points
from tests.chaos.arena import Arena
from tests.chaos.checks import everything, runs_of
from tests.chaos.conftest import LONG
from tests.chaos.nursery import Nursery
from tests.chaos.places import PATIENCE, wait_for

#: How often each point is hit in each kind of process.
HITS = 22 if LONG else 2
#: The same where each hit costs the start of a worker.
DEAR_HITS = 22 if LONG else 1
KINDS = ('late', 'early', 'again')

#: Where a task that does not acknowledge late is lost, and where its result was stored.
LOST = ('after claim', 'before code', 'in code', 'after code')
STORED = (
    'after result stored', 'before outcome', 'before commit', 'within commit', 'after commit',
    'before send', 'after send', 'before confirm', 'after confirm', 'after outcome',
)


@pytest.fixture(scope='module', params=['redis', 'sql'])
def arena(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Arena]:
    """An arena with sessions in one kind of storage, used by one test after the other."""
    folder: Path = tmp_path_factory.mktemp(f'kill-points-{request.param}')
    made = Arena(nursery, folder, storage=request.param)
    made.kind = request.param  # type: ignore[attr-defined]
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _calm(arena: Arena) -> Iterator[None]:
    """Leave no process and no order to the next test."""
    yield
    arena.calm()


def committing(arena: Any) -> tuple[str, ...]:
    """Return the points around a commit; a Lua script has no middle to be killed in."""
    return points.COMMIT + (points.WITHIN if arena.kind == 'sql' else ())


class Casualties:
    """Sessions, each with a kill ordered for it."""

    def __init__(self, arena: Arena):
        self.arena = arena
        self.kills_before = len(arena.journal.read('kills'))
        self.point_of: dict[str, str] = {}
        self.plans: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.ordered: Counter[str] = Counter()
        #: Sessions with two kills.
        self.twice: set[str] = set()

    def add(self, point: str, role: str, number: int, scenario: str = 'chain') -> str:
        """Order a kill for a new session; the kinds of tasks take turns."""
        kind = KINDS[(number + len(self.plans)) % len(KINDS)]
        uid = self.arena.uid(f'{scenario}-{kind}')
        plan = {'attempts': 2} if scenario == 'retry' else {}
        self.point_of[uid] = point
        self.plans[uid] = plan
        self.jobs[uid] = self.arena.job(uid, 'go', plan)
        self.order(point, role, uid)
        return uid

    def order(self, point: str, role: str, key: str) -> None:
        points.order(self.arena.folder, point, role, key)
        self.ordered[point] += 1

    def fire(self) -> None:
        self.arena.fire_until_acknowledged(*self.jobs.values())

    def fire_each_in_a_process(self) -> set[int]:
        """Return how the processes ended, of which some run side by side."""
        codes, jobs = set(), list(self.jobs.values())
        for start in range(0, len(jobs), 12):
            processes = [self.arena.fire(job) for job in jobs[start:start + 12]]
            codes |= {self.arena.nursery.wait(pid) for pid in processes}
        return codes

    def all_killed(self) -> None:
        """Wait until every order was carried out."""
        try:
            wait_for(lambda: not self.arena.open_orders(), 'every kill', self.patience)
        except AssertionError:
            raise AssertionError(f'nobody was killed at {self.arena.open_orders()}') from None

    @property
    def patience(self) -> float:
        """Seconds to wait at most; each kill may cost the start of a worker."""
        return PATIENCE + 2 * len(self.plans)

    def heal(self) -> None:
        """Wait until each session has ended as the rules demand, and the index is empty."""
        self.arena.settled(self.plans, self.patience)
        wait_for(lambda: not self.arena.dues(), 'the index of due dates is empty')

    def check(self, uids: Iterable[str] | None = None) -> None:
        """Look at everything from outside."""
        kills = self.arena.journal.read('kills')[self.kills_before:]
        made = Counter(kill['point'] for kill in kills)
        assert not made - self.ordered
        # Two threads of a process may have an order each; the second dies of the first's.
        assert sum((self.ordered - made).values()) <= 1 + sum(self.ordered.values()) // 50
        wrong = everything(self.arena, self.plans if uids is None else uids)
        assert not wrong, '\n'.join(wrong)
        runs = runs_of(self.arena.journal.read('executions'), [])
        self.starts = Counter((run.uid, run.instance) for run in runs)

    def hit_by_others(self) -> set[str]:
        """Return the sessions that were in a worker just when another's kill ended it."""
        kills = {kill['target']: kill for kill in self.arena.journal.read('kills')}
        runs = runs_of(self.arena.journal.read('executions'), [])
        there = [
            (run.uid, pid, run.end or run.start) for run in runs for pid in (run.pid, run.ppid)
        ]
        # What was received may have been claimed, though its code has not begun.
        there += [
            (message['uid'], message['pid'], message['at'])
            for message in self.arena.journal.read('received')
        ]
        return {
            uid for uid, pid, at in there
            if pid in kills and uid not in kills[pid]['uids'] and kills[pid]['at'] < at + 2e9
        }


def test_the_firing_process_is_killed(arena):
    """What was committed happens, what was not did not; a repeat does it exactly once."""
    dead = Casualties(arena)
    arena.keep_workers(1, '--concurrency', '3')
    for point in (*committing(arena), *points.SEND):
        for number in range(HITS):
            dead.add(point, 'firing', number)
    assert dead.fire_each_in_a_process() == {-9}
    assert not set(arena.acknowledged()) & {job['id'] for job in dead.jobs.values()}
    rolled_back = {
        uid for uid, point in dead.point_of.items() if point in ('before commit', 'within commit')
    }
    committed = {uid: {} for uid in dead.plans if uid not in rolled_back}
    arena.settled(committed)
    assert [uid for uid in rolled_back if arena.storage(uid).exists] == []

    dead.fire()
    answers = arena.acknowledged()
    for uid, job in dead.jobs.items():
        assert answers[job['id']]['duplicate'] == (uid not in rolled_back), dead.point_of[uid]
    dead.heal()
    dead.check()
    for uid in dead.plans:
        assert set(dead.arena.statuses(uid).values()) == {'finished'}
        assert arena.fired(uid) == ['go', 't_first', 't_second']
        assert dead.starts[uid, 't_first#0'] == dead.starts[uid, 't_second#0'] == 1


def _check_the_lost(dead: Casualties) -> None:
    """Check what a lost run came to, where the place of its death decides it."""
    others = dead.hit_by_others() | dead.twice
    for uid, point in dead.point_of.items():
        if uid.startswith('chain-') and uid not in others:
            wrong = _wrong_with(dead, uid, point)
            assert not wrong, f'{wrong} though killed {point}\n{dead.arena.describe([uid])}'


def _wrong_with(dead: Casualties, uid: str, point: str) -> str:
    statuses = dead.arena.statuses(uid)
    kind = uid.partition(':')[0].partition('-')[2]
    expected = {'t_first#0': 'finished'}
    if point in LOST and kind == 'early':
        expected = {'t_first#0': 'failed'}
        reason = dead.arena.storage(uid)['t_first#0'].metadata['reason']
        if reason != 'worker lost':
            return f'the reason is {reason!r}'
    elif point in LOST and kind == 'again':
        expected = {'t_first#0': 'replayed', 't_first#1': 'finished'}
    elif kind != 'late' and point not in STORED:
        # Whether its code had begun, Celery does not tell.
        return ''
    if any(statuses.get(name) != status for name, status in expected.items()):
        return f'{statuses}, not {expected}'
    if point in STORED and kind != 'late' and dead.starts[uid, 't_first#0'] != 1:
        return 'the code has run more than once'
    return ''


def _order_deaths_in_tasks(dead: Casualties, role: str) -> None:
    arena = dead.arena
    hits = DEAR_HITS if role == 'parent' else HITS
    for point in (*points.DELIVERY, *committing(arena), *points.SEND):
        for number in range(hits):
            dead.add(point, role, number)
    # A retry and a replay are committed, and sent, in the middle of a delivery.
    for scenario in ('retry', 'replay'):
        for point in (*committing(arena), *points.SEND, 'before outcome', 'after outcome'):
            for number in range(HITS if LONG else 1):
                dead.add(point, role, number, scenario)


def test_a_child_of_the_pool_is_killed(arena):
    """Celery reports the loss to the worker's parent, which lives on."""
    dead = Casualties(arena)
    workers = arena.keep_workers(4, '--concurrency', '2')
    _order_deaths_in_tasks(dead, 'child')
    dead.fire()
    dead.all_killed()
    dead.heal()
    dead.check()
    _check_the_lost(dead)
    assert workers.started == 4, 'no parent ended'


def test_a_workers_parent_is_killed(arena):
    """Parent and children are gone at once, and nobody reports anything."""
    dead = Casualties(arena)
    workers = arena.keep_workers(3, '--concurrency', '1')
    _order_deaths_in_tasks(dead, 'parent')
    for point in points.ACK:
        for number in range(DEAR_HITS):
            dead.add(point, 'parent', number)
    # The parent outlives its child and dies while it reports that.
    for point in (*committing(arena), 'before outcome', 'after outcome'):
        for number in range(DEAR_HITS):
            uid = dead.add(point, 'parent', number)
            dead.order('in code', 'child', uid)
            dead.twice.add(uid)
    dead.fire()
    dead.all_killed()
    dead.heal()
    dead.check()
    _check_the_lost(dead)
    # Two orders may meet in one parent, whose sweep does what another one's child left.
    assert workers.started > len(dead.point_of) / 2


@pytest.mark.parametrize('role', ['sweeper', 'parent'])
def test_a_sweeper_is_killed(arena, role):
    """A process that does nothing but sweep, and a worker's parent in the middle of its sweep."""
    dead = Casualties(arena)
    if role == 'sweeper':
        arena.keep_workers(3, '--concurrency', '1', triggers_sweep_interval=0)
        arena.keep_sweepers(2)
    else:
        arena.keep_workers(4, '--concurrency', '1')
    # Overdue because nobody sent them: their firing process dies after the commit.
    for point in ('after take', *points.SEND):
        for number in range(DEAR_HITS):
            uid = dead.add(point, role, number)
            dead.order('after commit', 'firing', uid)
    assert dead.fire_each_in_a_process() == {-9}
    # Overdue because nobody renews their lease: their worker's parent dies with them.
    late = [
        dead.add(point, role, number) for point in committing(arena) for number in range(DEAR_HITS)
    ]
    for uid in late:
        dead.order('in code', 'parent', uid)
    for _ in range(DEAR_HITS):
        dead.order('before take', role, points.ANY)
    dead.fire()
    dead.all_killed()
    dead.heal()
    dead.check()
