"""Processes that fork while they are connected: nobody uses, or ends, another's connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from celery_triggers.testing.conformance.support import fired, statuses
from celery_triggers.testing.media import Medium
from tests.conformance.test_forks import EACH, ROOT, THREADS, run

#: Children that end as Python programs do: what is registered is called, and what is left is
#: collected, also the connections that are their parents'.
ENDINGS = """
import atexit, gc, os, sys
import sqlalchemy as sa
from celery_triggers.testing.media import Medium

url, prefix, generations = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {'pool_size': 1, 'max_overflow': 0}
manager = Medium('sql', url, prefix=prefix).manager(
    {'t_each': {'andEvery': 'a', 'run': 'x'}}, triggers_storage_options=options
)

def connection_id():
    with manager.storage._database.engine.connect() as connection:
        postgresql = connection.dialect.name == 'postgresql'
        function = 'pg_backend_pid()' if postgresql else 'connection_id()'
        return connection.exec_driver_sql('SELECT ' + function).scalar_one()

def wait(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def fork(generation, uses):
    pid = os.fork()
    if pid:
        return wait(pid)
    atexit.register(gc.collect)
    if uses:
        manager.fire('a')
        assert connection_id() != mine
    if generation > 1:
        fork(generation - 1, uses)
    gc.collect()
    sys.exit(0)

manager.fire('a')
mine = connection_id()
for uses in (False, True, False):
    fork(generations, uses)
    manager.fire('a')
    assert connection_id() == mine, 'a child has ended the connection'
print('done', flush=True)
"""


@pytest.mark.parametrize('generations', [1, 2])
def test_a_child_that_ends_leaves_its_parents_connection_alone(
    server: Medium, generations: int
):
    assert run(ENDINGS, str(server.url), server.prefix, str(generations)) == 'done\n'
    assert len(statuses(server.manager(EACH))) == 4 + generations


def test_a_child_of_a_process_whose_threads_fire_can_fire(server: Medium):
    done = run(THREADS, server.key, str(server.url), server.prefix)
    codes, here, all_ = done.split(';')
    assert codes == str([0] * 10)
    assert int(all_) == int(here) + 10


#: A parent that dies in the middle of a commit, with a child that lives on.
ORPHANING = """
import os, signal, sys
import sqlalchemy as sa
from celery_triggers.testing.media import Medium

manager = Medium('sql', sys.argv[1], prefix=sys.argv[2]).manager(
    {'t_each': {'andEvery': 'a', 'run': 'x'}}
)
manager.fire('x')
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
engine = manager.storage._database.engine
sa.event.listen(engine, 'commit', lambda _: os.kill(os.getpid(), signal.SIGKILL))
manager.fire('a')
"""


def test_a_parent_that_is_killed_in_a_commit_holds_nobody_up(server: Medium):
    """Its children have no share of its connection, which the server therefore sees end."""
    process = subprocess.Popen(
        [sys.executable, '-c', ORPHANING, str(server.url), server.prefix], text=True,
        stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.wait(timeout=60) == -signal.SIGKILL
        os.kill(child, 0)
        manager = server.manager(EACH, triggers_storage_options={'lock_timeout': 5})
        assert manager.fire('a').released == ['t_each#0']
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert fired(manager) == ['x', 'a']
