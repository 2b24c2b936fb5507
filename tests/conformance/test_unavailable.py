"""A storage that is down says so, and what was being done can be repeated."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.media import Medium

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(('localhost', 0))
        yield taken.getsockname()[1]


ACTIONS: dict[str, Callable[[TriggerManager], Any]] = {
    'start': lambda manager: manager.start(),
    'cancel': lambda manager: manager.cancel(),
    'tasks': lambda manager: manager.storage.tasks,
    'instances': lambda manager: manager.storage.instances,
    'delete': lambda manager: manager.storage.delete(),
    'configuration': lambda manager: manager.update_configuration(EACH),
}


@pytest.mark.parametrize('event_id', [None, 'e'])
def test_firing_into_a_redis_that_is_down(closed_port: int, event_id: str | None):
    manager = Medium('redis', f'redis://:secret@localhost:{closed_port}/0').manager(EACH)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', event_id=event_id)
    assert caught.value.event_id
    assert event_id in (None, caught.value.event_id)
    assert not caught.value.outcome_unknown, 'it was reading'
    assert 'secret' not in str(caught.value)


@pytest.mark.parametrize('action', ACTIONS)
def test_anything_with_a_redis_that_is_down(closed_port: int, action: str):
    medium = Medium('redis', f'redis://localhost:{closed_port}/0')
    with pytest.raises(StorageUnavailable):
        ACTIONS[action](medium.manager(EACH))


def test_listing_the_sessions_of_a_redis_that_is_down(closed_port: int):
    with pytest.raises(StorageUnavailable):
        Medium('redis', f'redis://localhost:{closed_port}/0').uids()


@pytest.fixture
def hasty(sql_medium: Medium) -> TriggerManager:
    """A manager over SQLite that waits for a lock for a moment only."""
    application = sql_medium.application(
        EACH, triggers_storage_options={'connect_args': {'timeout': 0.02}}
    )
    manager = sql_medium.manager(application)
    manager.fire('a')
    return manager


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of another program, to lock the file with."""
    connection = sqlite3.connect(tmp_path / 'triggers.db', isolation_level=None)
    yield connection
    connection.close()


@pytest.mark.parametrize('event_id', [None, 'e'])
def test_firing_into_a_locked_sqlite_file(
    hasty: TriggerManager, lock: sqlite3.Connection, event_id: str | None
):
    lock.execute('BEGIN IMMEDIATE')
    with pytest.raises(StorageUnavailable) as caught:
        hasty.fire('a', event_id=event_id)
    error = caught.value
    assert error.event_id
    assert event_id in (None, error.event_id)
    assert statuses(hasty) == {'t_each#0': 'scheduled'}, 'it can still be read'
    lock.execute('ROLLBACK')
    assert not hasty.fire('a', event_id=error.event_id).duplicate
    assert hasty.fire('a', event_id=error.event_id).duplicate
    assert statuses(hasty) == {'t_each#0': 'scheduled', 't_each#1': 'scheduled'}


@pytest.mark.parametrize('action', sorted(ACTIONS.keys() - {'start', 'tasks', 'instances'}))
def test_changing_a_locked_sqlite_file(
    hasty: TriggerManager, lock: sqlite3.Connection, action: str
):
    lock.execute('BEGIN IMMEDIATE')
    with pytest.raises(StorageUnavailable):
        ACTIONS[action](hasty)


def test_claiming_in_a_locked_sqlite_file(hasty: TriggerManager, lock: sqlite3.Connection):
    run = delivery(hasty, 't_each#0')
    lock.execute('BEGIN IMMEDIATE')
    with pytest.raises(StorageUnavailable):
        run.claim()
    lock.execute('ROLLBACK')
    assert run.claim()


def test_a_folder_that_does_not_exist_is_an_unavailable_storage(tmp_path: Path):
    manager = Medium('sql', f'sqlite:///{tmp_path}/missing/triggers.db').manager(EACH)
    with pytest.raises(StorageUnavailable, match='unable to open') as caught:
        manager.fire('a', event_id='mine')
    assert caught.value.event_id == 'mine'
    assert not caught.value.outcome_unknown
    (tmp_path / 'missing').mkdir()
    assert manager.fire('a', event_id='mine').released == ['t_each#0']
