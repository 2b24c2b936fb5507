"""Processes that fork: no lock is inherited, and SQLite loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from celery_triggers.forks import ForkGate, ForkLock
from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.conformance.test_forks import in_child
from celery_triggers.testing.media import Medium
from tests.media import named

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}
ROOT = Path(__file__).resolve().parents[2]

DAEMON = """
import os, sys, subprocess
from celery_triggers.testing.media import Medium
medium = Medium('sql', sys.argv[1], prefix='fork')
manager = medium.manager({'t_each': {'andEvery': 'a', 'run': 'x'}})
manager.fire('a')
if os.fork():
    os._exit(0)
# The child is a daemon now: its parent is gone.
for number in range(20):
    manager.fire('a', {'n': number})
    if number in (5, 15):
        # Another process comes and goes; what it believes to be its own it tidies away.
        subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]], check=True)
print('done', flush=True)
"""

VISITOR = """
import sys
from celery_triggers.testing.media import Medium
Medium('sql', sys.argv[1], prefix='fork').manager({}, 'another').fire('a')
"""


THREADS = """
import os, sys, threading
from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.media import Medium
medium = Medium(sys.argv[1], sys.argv[2], prefix=sys.argv[3])
manager = medium.manager({'t_each': {'andEvery': 'a', 'run': 'x'}})
stop, fired = threading.Event(), []

def fire():
    while not stop.is_set():
        manager.fire('a')
        fired.append(1)

def fork():
    pid = os.fork()
    if pid == 0:
        try:
            medium.manager({'t_each': {'andEvery': 'a', 'run': 'x'}}).fire('a')
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# Once before there are threads: what is imported late would be imported in a fork.
manager.fire('a')
fired.append(1)
threads = [threading.Thread(target=fire) for _ in range(3)]
for thread in threads:
    thread.start()
codes = [fork() for _ in range(10)]
stop.set()
for thread in threads:
    thread.join()
print(codes, len(fired), len(statuses(manager)), sep=';')
"""


def run(script: str, *arguments: str) -> str:
    """Run a script in a fresh process, and return what it printed."""
    process = subprocess.Popen(
        [sys.executable, '-c', script, *arguments], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    try:
        out, errors = process.communicate(timeout=60)
    finally:
        # It and the children that it forked, should one of them hang.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, errors
    return out


def test_a_daemon_that_forked_after_its_first_firing_loses_nothing(tmp_path: Path):
    url = f'sqlite:///{tmp_path}/triggers.db'
    assert run(DAEMON, url, VISITOR) == 'done\n'
    assert len(statuses(Medium('sql', url, prefix='fork').manager(EACH))) == 21


@pytest.mark.parametrize('name', ['redis', 'sql-sqlite'])
def test_a_child_of_a_process_whose_threads_fire_can_fire(name: str, tmp_path: Path):
    # Without coverage, whose own lock a child could inherit from one of the threads.
    found = named(name).open(tmp_path)
    try:
        done = run(THREADS, found.key, str(found.url), found.prefix)
    finally:
        found.clear()
    codes, here, all_ = done.split(';')
    assert codes == str([0] * 10)
    assert int(all_) == int(here) + 10


def test_a_lock_that_another_thread_holds_is_free_in_a_child():
    lock = ForkLock()
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def enter() -> None:
        with lock, lock:
            pass

    try:
        assert in_child(enter) == 0
    finally:
        leave.set()
        thread.join()


def test_a_fork_waits_until_nobody_is_inside_but_not_for_ever():
    closed: list[str] = []
    gate = ForkGate(0.2, lambda: closed.append('closed'))
    inside, leave = threading.Event(), threading.Event()

    def visit() -> None:
        with gate:
            inside.set()
            leave.wait()
        closed.append('left')

    thread = threading.Thread(target=visit)
    thread.start()
    inside.wait()
    try:
        assert in_child(lambda: None) == 0
        assert closed == ['closed'], 'its patience was over'
        gate.patience = 30
        threading.Timer(0.1, leave.set).start()
        assert in_child(lambda: None) == 0
    finally:
        leave.set()
        thread.join()
    assert closed[1:] in (['closed', 'left'], ['left', 'closed'])
    with gate:
        pass


BUSY = """
import os, threading
from celery_triggers.forks import ForkGate

inside = []
inner = ForkGate(30, lambda: inside.append(inner._inside))
outer = ForkGate(30, lambda: inside.append(outer._inside), outer=True)
stop = threading.Event()

def visit(*gates):
    while not stop.is_set():
        with gates[0]:
            if gates[1:]:
                with gates[1]:
                    pass

places = [(inner,), (inner,), (inner,), (outer, inner), (outer, inner)]
threads = [threading.Thread(target=visit, args=gates) for gates in places]
for thread in threads:
    thread.start()

def fork():
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            with inner, outer:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

forkers = [threading.Thread(target=fork) for _ in range(2)]
for thread in forkers:
    thread.start()
for thread in forkers:
    thread.join()
stop.set()
for thread in threads:
    thread.join()
print(set(inside), len(inside))
"""


def test_busy_threads_do_not_keep_a_fork_waiting():
    """Whoever comes while a fork waits has to wait too; else it would never be its turn."""
    assert run(BUSY) == '{0} 40\n'
