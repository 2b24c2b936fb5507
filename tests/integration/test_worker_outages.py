"""What a worker does while its storage does not answer, and when its children are replaced."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import integration_app
import pytest
from integration_support import HERE

from tests.parts.servers import BROKER_DB, redis_url


@pytest.fixture(scope='module')
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('storage') / 'triggers.db'


@pytest.fixture(scope='module')
def lone(redis_server: str, start_worker: Any, file: Path) -> Iterator[Any]:
    """A worker with one child, over an SQLite file that it waits for a moment only."""
    worker = start_worker(
        redis_url(BROKER_DB), '--pool', 'prefork', '--concurrency', '1',
        triggers_storage=f'sqlite:///{file}',
        triggers_storage_options={'connect_args': {'timeout': 0.1}},
    )
    yield worker
    worker.stop()


@pytest.fixture
def lock(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        yield connection


def fire_and_hold(worker: Any, trigger: str, kwargs: Any = None) -> str:
    """Return the uid of a session whose task runs and waits to be told to go on."""
    uid: str = worker.fire('outages', trigger, kwargs)
    worker.wait_for(lambda: worker.lines(uid) == ['runs'], 'the task runs')
    return uid


def go_on(worker: Any, uid: str) -> None:
    integration_app.use_journal(worker.app)
    integration_app.note(uid, 'go on')


@pytest.mark.parametrize(
    ('trigger', 'kwargs', 'status', 'then'),
    [
        ('hold', {}, 'finished', 'follows'),
        ('hold', {'fail': True}, 'failed', 'mourns'),
        ('hold and retry', {}, 'finished', 'follows'),
    ],
)
def test_an_outcome_waits_for_a_storage_that_is_down(lone, lock, trigger, kwargs, status, then):
    uid = fire_and_hold(lone, trigger, kwargs)
    seen = lone.log.count('cannot be stored yet')
    lock.execute('BEGIN IMMEDIATE')
    go_on(lone, uid)
    lone.wait_for(lambda: lone.log.count('cannot be stored yet') > seen, 'the worker says so')
    lock.execute('ROLLBACK')
    lone.wait_for(lambda: lone.lines(uid) == ['runs', 'go on', then], 'what follows runs')
    assert status in {str(i.status) for i in lone.settled(uid, count=2).values()}
    assert lone.fired(uid).count(f't_{then}') == 1


def test_a_soft_time_limit_that_strikes_when_the_code_has_ended_loses_nothing(lone, lock):
    uid = fire_and_hold(lone, 'hold softly')
    lock.execute('BEGIN IMMEDIATE')
    go_on(lone, uid)
    lone.wait_for(lambda: 'Soft time limit (2s) exceeded' in lone.log, 'the limit has struck')
    lock.execute('ROLLBACK')
    found = lone.settled(uid, count=2)
    assert {str(i.status) for i in found.values()} == {'finished'}
    assert lone.fired(uid) == ['hold softly', 't_held_softly', 't_follows']


def test_a_child_that_takes_the_place_of_another_runs_tasks(lone):
    """It is forked while the parent reports the other, and must inherit no lock."""
    for _ in range(3):
        uid = lone.fire('outages', 'limit')
        for number in range(3):
            lone.app.triggers.fire(uid, 'quick', {'n': number})
        found = lone.settled(uid, count=4)
        assert str(found['t_limited#0'].status) == 'failed'
        assert [str(found[f't_quick#{n}'].status) for n in range(3)] == ['finished'] * 3


def test_a_task_of_a_deleted_session_fires_nothing(lone):
    uid = fire_and_hold(lone, 'hold and fire')
    assert lone.app.triggers.delete(uid)
    lone.app.triggers.fire(uid, 'again')
    go_on(lone, uid)
    lone.wait_for(lambda: 'any more: its session was deleted' in lone.log, 'the task is told')
    lone.settled(lone.fire('outages', 'quick'))
    assert lone.fired(uid) == ['again']


def test_a_worker_with_another_storage_says_so(redis_server, start_worker, tmp_path):
    """Where a relative path of SQLite leads, say."""
    other = start_worker(
        redis_url(BROKER_DB), '--pool', 'solo',
        triggers_storage=f'sqlite:///{tmp_path}/other.db',
    )
    try:
        header = {
            'uid': 'outages:x', 'incarnation': 'i', 'instance': 't_quick#0', 'task_id': 'x',
            'attempt': 0, 'manager': 'default', 'storage': 'sql',
        }
        name = other.app.triggers.workflow('outages:').tasks['t_quick'].run
        other.app.send_task(name, task_id='x', headers={'triggers': header})
        other.wait_for(lambda: 'has no such instance' in other.log, 'it is logged')
        assert f"{tmp_path}/other.db under the key prefix '{other.name}'" in other.log
    finally:
        other.stop()


@pytest.mark.parametrize(
    ('storage', 'words'),
    [
        ('memory://', 'keeps sessions in this process alone'),
        ('redi://localhost', "unknown storage backend in the setting triggers_storage, 'redi'"),
        ('sqlite://', 'in memory is lost'),
    ],
)
def test_a_worker_with_a_storage_that_cannot_be_used_does_not_start(run_python, storage, words):
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from celery import Celery
app = Celery('x', broker={redis_url(BROKER_DB)!r})
app.conf.triggers_storage = {storage!r}
app.worker_main(['worker', '--pool', 'solo'])
"""
    assert words in run_python(script, expect=1, C_FORCE_ROOT='1')


def test_a_worker_whose_storage_is_down_waits_for_it(run_python):
    """Its tasks come again until the storage answers."""
    script = f"""
from celery import Celery, signals
app = Celery('x', broker={redis_url(BROKER_DB)!r})
app.conf.update(triggers_storage='redis://127.0.0.1:1/0', task_default_queue='triggers-nobody')

@signals.worker_ready.connect(weak=False)
def leave(sender, **_):
    print('it is ready')
    raise SystemExit(0)

app.worker_main(['worker', '--pool', 'solo', '--without-gossip', '--without-mingle'])
"""
    out = run_python(script, expect=0, C_FORCE_ROOT='1')
    assert 'trigger tasks wait until the storage' in out
    assert 'it is ready' in out
