"""A storm: processes are killed at random every second while thousands of sessions run.

Pool children, workers' parents, firing processes and sweepers get SIGKILL; broker and storage
are restarted. What was lost is found out from outside, by the rules in
:mod:`tests.chaos.expect` and the checks in :mod:`tests.chaos.checks`.

``python -m tests.chaos.storm --seconds 240 --sessions 2000 --broker rabbitmq --storage sql``
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import points
from tests.chaos.arena import Arena
from tests.chaos.checks import (
    cascades,
    double_starts,
    inner_firings,
    out_of_order,
    overlaps,
    runs_of,
    unended,
)
from tests.chaos.journal import Tail
from tests.chaos.nursery import Nursery
from tests.chaos.places import RabbitServer, wait_for
from tests.chaos.recovery import Report, recoveries

SCENARIOS = {'join': 30, 'every': 20, 'retry': 15, 'chain': 15, 'failure': 10, 'replay': 10}
KINDS = {'late': 50, 'early': 25, 'again': 25}
VICTIMS = {'child': 45, 'parent': 20, 'firing': 20, 'sweeper': 15}

#: Where a kill may be ordered instead of being sent at any moment.
POINTS = {
    'firing': (*points.COMMIT, *points.SEND),
    'sweeper': (*points.TAKE, *points.COMMIT, *points.SEND),
    'child': (*points.DELIVERY, *points.COMMIT, *points.SEND),
    'parent': (*points.DELIVERY, *points.COMMIT, *points.SEND, *points.TAKE, *points.ACK),
}

WORKERS, CHILDREN, SWEEPERS, FIRING = 3, 3, 2, 3

#: The part of the storm in which triggers are fired.
FEEDING = 0.85


@dataclass
class Session:
    """What is fired into one session, and how it must end."""

    uid: str
    plan: dict[str, Any]
    jobs: list[dict[str, Any]]


class Storm:
    """One storm over one arena.

    Args:
        broker: ``'redis'`` or ``'rabbitmq'``, a private server of either kind.
        storage: ``'redis'`` or ``'sql'``.
        seed: Of every random choice here; the processes' timing is not repeatable.
    """

    def __init__(
        self, nursery: Nursery, folder: Path, *, seconds: float, sessions: int,
        broker: str = 'redis', storage: str = 'redis', seed: int = 0,
    ):
        self.random = random.Random(seed)
        self.seconds, self.storage_kind = seconds, storage
        self.nursery = nursery
        self.rabbit: RabbitServer | None = None
        if broker == 'rabbitmq':
            self.rabbit = RabbitServer(nursery, folder / 'rabbit').start()
        self.arena = Arena(
            nursery, folder, storage=storage, broker=self.rabbit.url if self.rabbit else '',
            worker_prefetch_multiplier=2,
            # Longer than a message waits in the queue while half of the workers are dead:
            # what is sent again without need makes the queue longer still.
            triggers_redeliver_after=15.0 if sessions > 500 else 5.0,
            # Celery calls a task failed whose result it cannot store: nothing to tell a
            # lost outcome by. So results live through the storm.
            results_apart=True,
        )
        if self.rabbit is not None:
            self.arena.servers.append(self.rabbit)
        self.report = Report(
            f'broker {broker}, storage {storage}, {sessions} sessions, seed {seed}',
            sessions=sessions,
        )
        self.sessions = [self._session() for _ in range(sessions)]
        self._queue = list(self.sessions)
        self._firing: dict[int, list[dict[str, Any]]] = {}
        self._ended = threading.Event()
        self._acks = Tail(folder / 'acks.jsonl')
        self._acknowledged: set[str] = set()
        self._executions = Tail(folder / 'executions.jsonl')
        self._running: dict[str, int] = {}
        self._errors: list[BaseException] = []

    # ----------------------------------------------------------------- sessions

    def _pick(self, weights: Mapping[str, int]) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def _session(self) -> Session:
        scenario, kind = self._pick(SCENARIOS), self._pick(KINDS)
        uid = self.arena.uid(f'{scenario}-{kind}')
        plan, firings = getattr(self, f'_{scenario}')()
        return Session(uid, plan, [self.arena.job(uid, *firing) for firing in firings])

    def _work(self) -> dict[str, Any]:
        """Return how long the code takes; a few runs take longer than a lease."""
        if self.random.random() < 0.03:
            return {'seconds': 3.5}
        return {'seconds': round(self.random.uniform(0, 0.3), 3)}

    def _chain(self) -> Any:
        return {}, [('go', self._work())]

    def _failure(self) -> Any:
        return {}, [('go', self._work())]

    def _retry(self) -> Any:
        plan = {
            **self._work(), 'attempts': self.random.randint(1, 3),
            'countdown': self.random.choice([0, 0, 0.3, 1.5]),
        }
        return plan, [('go', plan)]

    def _replay(self) -> Any:
        plan = {
            **self._work(), 'replays': self.random.randint(1, 2),
            'countdown': self.random.choice([0, 0, 0.5, 1.5]),
        }
        return plan, [('go', plan)]

    def _join(self) -> Any:
        plan = {'paid': True, 'cancelled': self.random.random() < 0.25}
        firings: list[tuple[str, dict[str, Any]]] = [('ordered', self._work()), ('paid', {})]
        self.random.shuffle(firings)
        if plan['cancelled']:
            # Before the payment, without which nothing is shipped: so it is never too late.
            at = [trigger for trigger, _ in firings].index('paid')
            firings.insert(self.random.randint(0, at), ('cancelled', {}))
        elif self.random.random() < 0.15:
            plan['paid'] = False
            firings.remove(('paid', {}))
        return plan, firings

    def _every(self) -> Any:
        plan = {'scans': self.random.randint(1, 4)}
        firings: list[tuple[str, dict[str, Any]]] = [
            ('scanned', {**self._work(), 'number': number}) for number in range(plan['scans'])
        ]
        firings.insert(self.random.randint(0, len(firings)), ('opened', {}))
        return plan, firings

    # ------------------------------------------------------------------- firing

    def _feed(self) -> None:
        """Keep firing processes busy until every firing has been acknowledged."""
        pause = FIRING * self.seconds / max(1, sum(len(s.jobs) for s in self.sessions))
        pause *= FEEDING
        while self._queue or self._firing:
            for pid in [pid for pid in self._firing if not self.nursery.alive(pid)]:
                left = self._unacknowledged(self._firing.pop(pid))
                if left:
                    self._start_firing(left)
            while self._queue and len(self._firing) < FIRING:
                batch, self._queue = self._queue[:8], self._queue[8:]
                jobs = [job for session in batch for job in session.jobs]
                for job in jobs:
                    job['pause'] = self.random.uniform(0, 2 * pause)
                self._start_firing(jobs)
            time.sleep(0.02)

    def _unacknowledged(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for ack in self._acks.more():
            if ack['ok']:
                self._acknowledged.add(ack['id'])
            elif ack.get('error'):
                raise AssertionError(f'fire() raised {ack["error"]}')
        return [job for job in jobs if job['id'] not in self._acknowledged]

    def _start_firing(self, jobs: list[dict[str, Any]]) -> None:
        self._firing[self.arena.fire(*jobs)] = jobs

    # -------------------------------------------------------------------- kills

    def _kill_at_random(self) -> None:
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            self._kill_one(self._pick(VICTIMS))
            time.sleep(self.random.uniform(0.5, 1.5))
        self._ended.set()

    def _kill_one(self, role: str) -> None:
        if self.random.random() < 0.4:
            points.order(
                self.arena.folder, self.random.choice(POINTS[role]), role, points.ANY
            )
            return
        pids = {
            'firing': list(self._firing), 'sweeper': self.sweepers.pids,
            'parent': self.workers.pids, 'child': self.workers.pids,
        }[role]
        if not pids:
            return
        pid = self.random.choice(list(pids))
        if role == 'child':
            self._kill_child()
        else:
            self.arena.kill(pid, role)

    def _kill_child(self) -> None:
        """Kill a child, mostly one that runs code."""
        for line in self._executions.more():
            if line['what'] == 'start':
                self._running[line['run']] = line['pid']
            else:
                self._running.pop(line['run'], None)
        parents = {child: pid for pid in self.workers.pids
                   for child in self.nursery.children_of(pid)}
        busy = [pid for pid in self._running.values() if pid in parents]
        candidates = busy if busy and self.random.random() < 0.7 else list(parents)
        if candidates:
            child = self.random.choice(candidates)
            self.arena.journal.write(
                'kills', target=child, uids=[], role='child', point='any', key='', do='kill'
            )
            self.nursery.kill_child(parents[child], child)

    # ------------------------------------------------------------------ outages

    def _restart_at_random(self, what: str, times: int) -> None:
        """Take the broker or the storage away and bring it back, a few times."""
        moments = sorted(self.random.uniform(0.1, 0.9) * self.seconds for _ in range(times))
        begun = time.monotonic()
        for number, moment in enumerate(moments):
            if self._ended.wait(max(0.0, begun + moment - time.monotonic())):
                return
            self.arena.journal.write('outages', what=what, begins=True)
            self._restart(what, hard=number % 2 == 0)
            self.arena.journal.write('outages', what=what, begins=False)
            self.report.outages[what] += 1

    def _restart(self, what: str, *, hard: bool) -> None:
        away = self.random.uniform(0.2, 3)
        if what == 'storage' and self.storage_kind == 'sql':
            database = sqlite3.connect(self.arena.folder / 'sessions.db', timeout=30)
            with contextlib.closing(database):
                database.execute('BEGIN EXCLUSIVE')
                time.sleep(away)
                database.rollback()
            return
        server: Any = self.arena.store
        if what == 'broker':
            server = self.rabbit or self.arena.broker
        server.stop(hard=hard)
        time.sleep(away)
        server.start()

    # ---------------------------------------------------------------------- run

    def run(self) -> Report:
        """Rage, let everything heal, and look."""
        self.workers = self.arena.keep_workers(WORKERS, '--concurrency', str(CHILDREN))
        self.sweepers = self.arena.keep_sweepers(SWEEPERS, 0.3)
        times = max(2, round(self.seconds / 40))
        threads = [
            self._thread(self._feed),
            self._thread(self._kill_at_random),
            self._thread(self._restart_at_random, 'broker', times),
            self._thread(self._restart_at_random, 'storage', times),
        ]
        begun = time.monotonic()
        self._ended.wait()
        self.report.seconds = time.monotonic() - begun
        points.withdraw_all(self.arena.folder)
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        healing = time.monotonic()
        self._heal()
        self.report.healed_after = time.monotonic() - healing
        self._look()
        return self.report

    def _thread(self, function: Any, *args: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                function(*args)
            except BaseException as exc:
                self._errors.append(exc)
                self._ended.set()

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def _heal(self) -> None:
        """Wait until all is as the rules demand; replay by hand what was lost."""
        left = {session.uid: session.plan for session in self.sessions}
        self._problems: dict[str, str] = {}
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self._shrink(left), 'sessions end')
            self._replay_what_failed()
            wait_for(lambda: not self.arena.dues(), 'the index is empty', 30)
        self.report.lost = [
            f'{uid}: {self._problems[uid]}\n{self.arena.describe([uid])}' for uid in left
        ]

    def _shrink(self, left: dict[str, Any]) -> dict[str, Any]:
        for uid, plan in list(left.items()):
            self._problems[uid] = self.arena.problem(uid, plan)
            if not self._problems[uid]:
                del left[uid]
        return left

    def _replay_what_failed(self) -> None:
        jobs = []
        plans = {}
        for session in self.sessions:
            if '-early:' not in session.uid or session.uid.startswith('failure'):
                continue
            for name, instance in self.arena.instances(session.uid).items():
                if instance.status == 'failed':
                    jobs.append({'id': f'replay {session.uid} {name}', 'uid': session.uid,
                                 'replay': name})
                    plans[session.uid] = session.plan
        self.arena.fire_until_acknowledged(*jobs)
        self.arena.settled(plans)
        for uid in plans:
            statuses = self.arena.statuses(uid)
            if 'failed' in statuses.values():
                self.report.other.append(f'replayed by hand in calm, {uid} failed: {statuses}')

    # --------------------------------------------------------------------- look

    def _look(self) -> None:
        arena, report = self.arena, self.report
        executions, kills = arena.journal.read('executions'), arena.journal.read('kills')
        runs = runs_of(executions, kills)
        report.executions = len(runs)
        report.runs = Counter(Counter((run.uid, run.instance) for run in runs).values())
        report.attempts = Counter(
            Counter((run.uid, run.instance, run.attempt) for run in runs).values()
        )
        report.kills = Counter(kill['role'] for kill in kills)
        report.overlapping = overlaps(runs)
        report.other += double_starts(arena, runs)
        report.other += out_of_order(runs)
        report.other += [f'left in the index: {due}' for due in arena.dues()]
        found: dict[str, Any] = {}
        for session in self.sessions:
            found[session.uid] = arena.instances(session.uid)
            report.instances += len(found[session.uid])
            report.doubled += cascades(arena, session.uid)
            report.doubled += inner_firings(arena, session.uid)
            report.other += unended(arena, session.uid)
        report.recovery = recoveries(runs, kills, arena.journal.read('received'), found)


def storm(
    nursery: Nursery, folder: Path, report_to: str | Path | None = None, **settings: Any
) -> Report:
    """Make a storm, print its report, append it to a file if one is named."""
    raging = Storm(nursery, folder, **settings)
    try:
        report = raging.run()
    finally:
        raging.arena.close()
    print(report.markdown())
    if report_to:
        with Path(report_to).open('a') as file:
            file.write(report.markdown() + '\n')
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=240)
    parser.add_argument('--sessions', type=int, default=2000)
    parser.add_argument('--broker', choices=['redis', 'rabbitmq'], default='redis')
    parser.add_argument('--storage', choices=['redis', 'sql'], default='redis')
    parser.add_argument('--seed', type=int, default=int(time.time()))
    parser.add_argument('--report', help='a file to append the tables to, as markdown')
    parser.add_argument('--keep', action='store_true', help='keep journals and logs')
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='triggers-storm-'))
    nursery = Nursery()
    try:
        report = storm(
            nursery, folder, arguments.report, seconds=arguments.seconds,
            sessions=arguments.sessions, broker=arguments.broker, storage=arguments.storage,
            seed=arguments.seed,
        )
    finally:
        nursery.close()
        if arguments.keep:
            print(f'journals and logs are in {folder}')
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print('\n'.join(report.wrong[:20]) or 'nothing is wrong')
    return int(bool(report.wrong))


if __name__ == '__main__':
    sys.exit(main())
