"""Servers that close connections, stop, say nothing or die in the middle of a commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium
from tests.parts.proxy import DatabaseProxy, SilentServer
from tests.parts.waiting import eventually
from tests.sql.places import (
    ONE,
    Sessions,
    connected,
    database_of,
    one_connection,
    sweep,
)

ROOT = Path(__file__).resolve().parents[2]

TASKS: dict[str, Any] = {'t_each': {'andEvery': 'a', 'run': 'x'}}

#: Options of a storage that soon gives up a server which says nothing.
IMPATIENT = {**ONE, 'statement_timeout': 1, 'connect_args': {'connect_timeout': 1}}


@contextmanager
def at_commit(manager: TriggerManager, what: Callable[[], Any]) -> Iterator[None]:
    """Do something once, after the last statement of a transaction and before its COMMIT."""
    engine = database_of(manager).engine
    left = [what]

    def note(_connection: Any) -> None:
        if left:
            left.pop()()

    sa.event.listen(engine, 'commit', note)
    try:
        yield
    finally:
        sa.event.remove(engine, 'commit', note)
    assert not left, 'nothing was committed'


@pytest.fixture
def proxy(server: Medium) -> Iterator[DatabaseProxy]:
    """What is between the storage and each server in turn."""
    with DatabaseProxy(str(server.url)) as found:
        yield found


@pytest.fixture
def manager(server: Medium, proxy: DatabaseProxy) -> TriggerManager:
    """A manager that reaches its server by the proxy, and whose session exists."""
    medium = replace(server, url=proxy.through)
    found = medium.manager(TASKS, triggers_storage_options=IMPATIENT)
    found.fire('x')
    return found


# ------------------------------------------------------------ connections that are closed

ACTIONS: dict[str, Callable[[TriggerManager], Any]] = {
    'firing': lambda manager: manager.fire('a'),
    'reading': lambda manager: manager.storage.instances,
    'claiming': lambda manager: delivery(manager, 't_each#0').claim(),
    'sweeping': sweep,
    'deleting': lambda manager: manager.storage.delete(),
}


@pytest.mark.parametrize('action', ACTIONS)
def test_a_connection_that_the_server_closed_in_the_pool(server: Medium, action: str):
    manager = server.manager(TASKS, **one_connection())
    manager.fire('a')
    with connected(server) as outside:
        theirs = Sessions(manager, outside)
        id_ = theirs.id()
        theirs.kill(id_)
        assert ACTIONS[action](manager) is not False
        assert theirs.id() != id_


def test_every_connection_of_the_pool_was_closed(server: Medium):
    manager = server.manager(TASKS)
    manager.fire('a')
    engine = database_of(manager).engine
    several = [engine.connect() for _ in range(4)]
    with connected(server) as outside:
        theirs = Sessions(manager, outside)
        ids = {theirs.id_of(connection) for connection in several}
        for connection in several:
            connection.close()
        assert len(ids) == 4
        for id_ in ids:
            theirs.kill(id_)
        assert manager.fire('a').released == ['t_each#1']


def test_a_connection_that_the_server_closes_before_the_commit(server: Medium):
    manager = server.manager(TASKS, **one_connection())
    manager.fire('x')
    with connected(server) as outside:
        theirs = Sessions(manager, outside)
        id_ = theirs.id()
        with at_commit(manager, lambda: theirs.kill(id_)):
            firing = manager.fire('a', {'n': 1})
    assert firing.released == ['t_each#0']
    assert not firing.duplicate
    assert fired(manager) == ['x', 'a']


def test_a_claim_that_the_server_cuts_off_before_its_commit(server: Medium):
    manager = server.manager(TASKS, **one_connection())
    manager.fire('a')
    run = delivery(manager, 't_each#0')
    with connected(server) as outside:
        theirs = Sessions(manager, outside)
        id_ = theirs.id()
        with at_commit(manager, lambda: theirs.kill(id_)):
            assert run.claim()
    assert not delivery(manager, 't_each#0', 'another').claim()
    assert run.finish(None)


def test_an_answer_to_a_commit_that_is_lost(manager: TriggerManager, proxy: DatabaseProxy):
    """The server committed; the storage finds that out when it tries again."""
    with at_commit(manager, lambda: lose(proxy)):
        firing = manager.fire('a', {'n': 1})
    assert firing.released == ['t_each#0']
    assert not firing.duplicate
    assert fired(manager) == ['x', 'a']


def lose(proxy: DatabaseProxy, *, breaks: bool = False) -> None:
    proxy.breaks_then = breaks
    proxy.lose_answer_to = b'COMMIT'


WHATS: dict[str, tuple[Callable[[DatabaseProxy], Any], bool]] = {
    'lost with the answer': (lambda proxy: lose(proxy, breaks=True), True),
    'gone before the commit': (DatabaseProxy.break_, False),
}


@pytest.mark.parametrize('event_id', [None, 'e'])
@pytest.mark.parametrize('what', WHATS)
def test_a_server_that_is_gone_at_the_commit_leaves_it_open(
    manager: TriggerManager, proxy: DatabaseProxy, what: str, event_id: str | None
):
    """Nobody knows whether it was committed; repeating it is right in either case."""
    happens, committed = WHATS[what]
    with at_commit(manager, lambda: happens(proxy)):
        with pytest.raises(StorageUnavailable) as caught:
            manager.fire('a', event_id=event_id)
    error = caught.value
    assert error.outcome_unknown
    assert event_id in (None, error.event_id)
    proxy.mend()
    again = eventually_fires(manager, error.event_id)
    assert again.duplicate == committed
    assert fired(manager) == ['x', 'a']


def eventually_fires(manager: TriggerManager, event_id: str | None) -> Any:
    """Fire until the server has noticed that the other connection is gone."""

    def fire() -> Any:
        try:
            return manager.fire('a', event_id=event_id)
        except StorageUnavailable:
            return None

    return eventually(fire)


@pytest.mark.parametrize(
    'ends', [DatabaseProxy.break_, DatabaseProxy.freeze], ids=['gone', 'silent']
)
def test_a_server_that_ends_before_the_commit_begins(
    manager: TriggerManager, proxy: DatabaseProxy, ends: Callable[[DatabaseProxy], None]
):
    ends(proxy)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', event_id='e')
    assert not caught.value.outcome_unknown
    proxy.mend()
    assert not manager.fire('a', event_id='e').duplicate


# ----------------------------------------------------------------- servers that say nothing


def test_a_server_that_never_answers(server: Medium):
    with SilentServer() as silent:
        url = sa.make_url(str(server.url)).set(host='127.0.0.1', port=silent.port)
        medium = replace(server, url=url.render_as_string(hide_password=False))
        manager = medium.manager(TASKS, triggers_storage_options=IMPATIENT)
        with pytest.raises(StorageUnavailable) as caught:
            manager.fire('a', event_id='e')
    assert not caught.value.outcome_unknown
    assert caught.value.event_id == 'e'


def test_a_server_that_stops_answering_at_the_commit(manager: TriggerManager, proxy: DatabaseProxy):
    with at_commit(manager, proxy.freeze):
        with pytest.raises(StorageUnavailable) as caught:
            manager.fire('a', event_id='e')
    assert caught.value.outcome_unknown
    proxy.mend()
    assert eventually_fires(manager, 'e')
    assert fired(manager) == ['x', 'a']


# --------------------------------------------------------- processes that are interrupted


class TimeIsUp(Exception):
    """What a soft time limit raises, wherever the process is."""


def test_what_strikes_while_the_server_is_asked(server: Medium):
    """It is raised as it is, and the answer is not taken for that to something else."""
    manager = server.manager(TASKS, **one_connection())
    manager.fire('x')

    def strike(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGUSR1, strike)
    try:
        with connected(server) as other, connected(server) as outside:
            theirs = Sessions(manager, outside)
            id_ = theirs.id()
            other.execute(sa.select(database_of(manager).tables.sessions).with_for_update())
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_interrupt_when, lambda: theirs.is_waiting(id_))
                with pytest.raises(TimeIsUp):
                    manager.fire('a', event_id='e')
            assert manager.storage.exists
            assert theirs.id() != id_
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not manager.fire('a', event_id='e').duplicate
    assert fired(manager) == ['x', 'a']


def _interrupt_when(condition: Callable[[], bool]) -> None:
    eventually(condition)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


# --------------------------------------------------------------- processes that are stopped

STOPPED = """
import json, os, signal, sys
import sqlalchemy as sa
from celery_triggers.testing.media import Medium

url, prefix = sys.argv[1:]
manager = Medium('sql', url, prefix=prefix).manager(
    {'t_each': {'andEvery': 'a', 'run': 'x'}},
    triggers_storage_options={'statement_timeout': 1, 'lock_timeout': 20},
)
manager.storage.exists
engine = manager.storage._database.engine
left = [1]

def stop(_connection):
    if left:
        left.pop()
        print('stopping', flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

sa.event.listen(engine, 'commit', stop)
firing = manager.fire('a', {'stopped': True})
print(json.dumps(firing.duplicate), flush=True)
"""


def test_a_process_that_is_stopped_in_a_commit_holds_nobody_up(server: Medium):
    """Longer than its ``statement_timeout``, that is: then the server undoes it."""
    manager = server.manager(TASKS, triggers_storage_options={'lock_timeout': 20})
    manager.fire('x')
    process = subprocess.Popen(
        [sys.executable, '-c', STOPPED, str(server.url), server.prefix], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == 'stopping\n'
        eventually(lambda: _state(process.pid) == 'T')
        assert manager.fire('a').released == ['t_each#0']
        process.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (out, errors) == ('false\n', '')
    assert fired(manager) == ['x', 'a', 'a']
    assert statuses(manager) == {'t_each#0': 'scheduled', 't_each#1': 'scheduled'}


def _state(pid: int) -> str:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
