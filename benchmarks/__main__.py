"""Every claim about speed, each beside a baseline in the same run: ``make bench``.

Measurements and baselines are interleaved, and medians compared, so that what the
machine does besides hits both alike. Needs a Redis: ``TRIGGERS_TEST_REDIS`` names one
other than ``redis://localhost:6379``; its databases 14 and 15 are emptied.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from benchmarks.crowd import rate
from benchmarks.shop import SERVER, make_app
from benchmarks.workers import questionnaires


@dataclass
class Row:
    """One line of the table: what was measured, its baseline, and what it may cost."""

    what: str
    measured: float
    baseline: float
    unit: str
    budget: str

    def text(self) -> str:
        ratio = self.measured / self.baseline if self.baseline else float('nan')
        return (
            f'{self.what:<52} {self.measured:>9.3f} {self.baseline:>9.3f} {self.unit:<3} '
            f'{ratio:>6.2f}x   {self.budget}'
        )


def interleaved(
    measure: Callable[[], object], baseline: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return the median milliseconds of two calls, made in turn."""
    for call in (measure, baseline) * 20:
        call()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for kept, call in zip(times, (measure, baseline), strict=True):
            start = time.perf_counter()
            call()
            kept.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def fresh_uids(prefix: str) -> Callable[[], str]:
    """Return a function that gives a uid which no session has had."""
    run, numbers = uuid.uuid4().hex, iter(range(10**9))
    return lambda: f'{prefix}{run}:{next(numbers)}'


def waiting(app: Any, client: Any, rounds: int) -> Row:
    """Measure a firing that releases nothing, in a session that exists."""
    fire, uid = app.triggers.fire, fresh_uids('wait:')()
    fire(uid, 'a', {'n': 1})
    client.set('bench', 'x' * 100)
    measured, baseline = interleaved(
        lambda: fire(uid, 'c', {'n': 1}), lambda: client.get('bench'), rounds
    )
    return Row('fire that releases nothing | GET', measured, baseline, 'ms', '<= 3x')


def first(app: Any, client: Any, rounds: int) -> Row:
    """Measure the firing that makes a session and leaves it waiting."""
    fire, uid = app.triggers.fire, fresh_uids('wait:')
    measured, baseline = interleaved(
        lambda: fire(uid(), 'a', {'n': 1}), lambda: client.get('bench'), rounds
    )
    return Row('fire that starts a session | GET', measured, baseline, 'ms', '')


def in_bulk(app: Any) -> Row:
    """Measure firing into 1,000 sessions at once beside firing one after the other."""
    uid = fresh_uids('wait:')
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        ours, theirs = ([(uid(), 'a', {'n': 1}) for _ in range(1000)] for _ in range(2))
        start = time.perf_counter()
        app.triggers.fire_many(ours)
        middle = time.perf_counter()
        for firing in theirs:
            app.triggers.fire(*firing)
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    measured, baseline = (statistics.median(column) for column in times)
    return Row('fire_many of 1,000, each | fire', measured, baseline, 'ms', '')


def releasing(app: Any, rounds: int) -> Row:
    """Measure a firing that releases one task beside sending that task."""
    fire, uid = app.triggers.fire, fresh_uids('go:')
    kwargs = {'trigger_kwargs': {'a': {'n': 1}}}
    measured, baseline = interleaved(
        lambda: fire(uid(), 'a', {'n': 1}),
        lambda: app.bench_task.apply_async(kwargs=kwargs),
        rounds,
    )
    return Row('fire that releases one task | apply_async', measured, baseline, 'ms', '<= 1.5x')


def growing(app: Any, rounds: int) -> Row:
    """Measure a firing in a session of 10,000 waiting instances beside one of 10."""
    fire, uid = app.triggers.fire, fresh_uids('big:')
    large, small = uid(), uid()
    for name, count in ((large, 10_000), (small, 10)):
        for n in range(count):
            fire(name, 'd', {'n': n})
    measured, baseline = interleaved(
        lambda: fire(large, 'd', {'n': 1}), lambda: fire(small, 'd', {'n': 1}), rounds
    )
    return Row('fire among 10,000 instances | among 10', measured, baseline, 'ms', '<= 1.2x')


def memory(app: Any, client: Any) -> Row:
    """Measure what a waiting session takes in Redis."""
    uid = fresh_uids('order:')()
    app.triggers.configure({'t_ship': {'after': ['paid', 'packed'], 'run': 'x'}}, 'order:')
    app.triggers.fire(uid, 'paid', {'amount': 99})
    sessions = redis.Redis.from_url(f'{SERVER}/15')
    used = sum(
        sessions.memory_usage(key) or 0
        for key in sessions.scan_iter('*', count=1000)
        if key.decode().endswith(uid)
    )
    return Row('a waiting session | 1 KB', used / 1024, 1.0, 'KB', '<= 1x')


def idle_sweep(client: Any) -> Row:
    """Measure a sweep over a million due dates of which none has come."""
    app = make_app()
    app.conf.triggers_key_prefix = 'million'
    later = int(time.time() * 1000) + 10**9
    for shard in range(64):
        members = {f'9:order:{n:04d}t_x#{n}': later + n for n in range(1_000_000 // 64)}
        client.zadd(f'million:{{{shard}}}:d', members)
    measured, baseline = interleaved(
        app.triggers.sweep, lambda: client.get('bench'), rounds=100
    )
    client.delete(*(f'million:{{{shard}}}:d' for shard in range(64)))
    return Row('a sweep, a million dates to come | GET', measured, baseline, 'ms', '<= 10 ms')


def imports() -> Row:
    """Measure importing Celery with the package beside Celery without it."""
    # What hides it has to be imported in both, and kombu imports it anyway.
    code = 'import importlib.metadata as m, time; t = time.perf_counter(); ' \
           'from celery import Celery; Celery; ' \
           'print((time.perf_counter() - t) * 1000)'
    # A finder that hides the package's entry point is what it takes to be without it.
    hidden = (
        'import importlib.metadata as m; old = m.entry_points; '
        'm.entry_points = lambda **k: [e for e in old(**k) if "celery_triggers" not in e.value]; '
    )

    def run(program: str) -> float:
        done = subprocess.run(
            [sys.executable, '-c', program], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    pairs = [(run(code), run(hidden + code)) for _ in range(15)]
    measured, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row('import celery with the package | without', measured, baseline, 'ms', '<= +25 ms')


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks')
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    parser.add_argument('--without-workers', action='store_true')
    options = parser.parse_args()
    rounds = 200 if options.quick else 2000
    for database in (14, 15):
        redis.Redis.from_url(f'{SERVER}/{database}').flushdb()
    app = make_app()
    client: Any = redis.Redis.from_url(f'{SERVER}/15', decode_responses=True)
    print(f'{"what | baseline":<52} {"measured":>9} {"baseline":>9}      ratio   budget')
    print(waiting(app, client, rounds).text(), flush=True)
    print(first(app, client, rounds).text(), flush=True)
    print(in_bulk(app).text(), flush=True)
    print(releasing(app, rounds).text(), flush=True)
    print(growing(app, rounds).text(), flush=True)
    print(memory(app, client).text(), flush=True)
    print(idle_sweep(client).text(), flush=True)
    print(imports().text(), flush=True)
    crowd = Row('16 processes in one session | 1', rate(16), rate(1), '/s', '>= 0.8x')
    print(crowd.text(), flush=True)
    if not options.without_workers:
        seconds, tasks, bare = questionnaires(SERVER, 200)
        print(
            Row(f'200 questionnaires ({tasks} tasks) | bare tasks', seconds, bare, 's', '').text()
        )


if __name__ == '__main__':
    main()
