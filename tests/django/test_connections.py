"""Connections: broken ones, forked ones, those of threads; what errors of a database mean."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg.errors
import pytest
from celery import Celery

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.conformance.test_forks import in_child
from celery_triggers.testing.media import Medium
from tests.django.conftest import TASKS


@pytest.fixture
def manager(medium: Medium) -> TriggerManager:
    manager = medium.manager(TASKS)
    manager.fire('item')
    return manager


@pytest.fixture
def another_database(alias: str) -> Iterator[Callable[..., str]]:
    """Make aliases that differ a little."""
    from django.db import connections

    made: list[str] = []

    def make(**changes: Any) -> str:
        name = f'another-{len(made)}'
        connections.settings[name] = {**connections.settings[alias], **changes}
        made.append(name)
        return name

    yield make
    for name in made:
        connections[name].close()
        del connections[name]
        del connections.settings[name]


def server_id(alias: str) -> int:
    """Return what the server calls this thread's connection."""
    from django.db import connections

    question = {
        'postgresql': 'SELECT pg_backend_pid()', 'mysql': 'SELECT CONNECTION_ID()'
    }[connections[alias].vendor]
    with connections[alias].cursor() as cursor:
        cursor.execute(question)
        return int(cursor.fetchone()[0])


def end_on_server(alias: str) -> None:
    """Let the server end this thread's connection, as it does when it is started anew."""
    from django.db import connections

    number = server_id(alias)
    other = connections[alias].copy()
    command = {
        'postgresql': 'SELECT pg_terminate_backend(%s, 5000)', 'mysql': 'KILL %s'
    }[other.vendor]
    with other.cursor() as cursor:
        cursor.execute(command, [number])
    other.close()


@contextmanager
def failing(alias: str, error: Callable[[], Exception], *, times: int = 1) -> Iterator[list[str]]:
    """Let the next statements that write to a session's row fail."""
    from django.db import connections

    failed: list[str] = []

    def fail(execute: Any, sql: str, *args: Any) -> Any:
        if 'UPDATE' in sql and 'celery_triggers_session' in sql and len(failed) < times:
            failed.append(sql)
            raise error()
        return execute(sql, *args)

    with connections[alias].execute_wrapper(fail):
        yield failed


def deadlock() -> Exception:
    from django.db import OperationalError

    error = OperationalError('deadlock detected')
    error.__cause__ = psycopg.errors.DeadlockDetected()
    return error


# ------------------------------------------------------------------ broken connections


def test_after_a_restart_of_the_server_everything_goes_on(manager: TriggerManager, alias: str):
    if alias == 'sqlite':
        pytest.skip('it has no server')
    run = delivery(manager, 't_each#0')
    actions: list[Callable[[], Any]] = [
        lambda: manager.storage.load(),
        lambda: manager.fire('item'),
        run.claim,
        lambda: run.finish(None),
        manager.storage.delete,
    ]
    for action in actions:
        end_on_server(alias)
        action()
    assert not manager.storage.exists


def test_a_connection_that_breaks_within_a_transaction_is_the_applications_error(
    manager: TriggerManager, alias: str
):
    if alias == 'sqlite':
        pytest.skip('it has no server')
    from django.db import Error, transaction

    def fire() -> None:
        end_on_server(alias)
        manager.fire('item')

    with pytest.raises(Error), transaction.atomic(alias):
        fire()
    assert statuses(manager) == {'t_each#0': 'scheduled'}


def test_a_server_that_is_away_is_unavailable(
    medium: Medium, alias: str, another_database: Callable[..., str], tmp_path: Path
):
    changes = {'NAME': str(tmp_path / 'no/such')} if alias == 'sqlite' else {'PORT': 1}
    away = medium.storage_class(
        'x', f'django://{another_database(**changes)}', application=medium.application(TASKS)
    )
    with pytest.raises(StorageUnavailable) as caught:
        medium.manager().__class__(away).fire('item')
    assert not caught.value.outcome_unknown
    assert caught.value.event_id


# ------------------------------------------------------------------- what errors mean


def test_an_error_before_the_commit_changed_nothing(manager: TriggerManager, alias: str):
    from django.db import OperationalError

    with failing(alias, lambda: OperationalError('out of memory'), times=99):
        with pytest.raises(StorageUnavailable) as caught:
            manager.fire('item')
    assert not caught.value.outcome_unknown
    assert list(statuses(manager)) == ['t_each#0']


def test_an_error_of_the_commit_itself_leaves_it_unknown(
    manager: TriggerManager, alias: str, monkeypatch: pytest.MonkeyPatch
):
    from django.db import OperationalError, connections

    connection = connections[alias]
    real = connection._commit

    def lost() -> None:
        real()
        raise OperationalError('the answer was lost')

    monkeypatch.setattr(connection, '_commit', lost)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('item')
    monkeypatch.undo()
    # SQLite is no server that could be gone with the answer.
    assert caught.value.outcome_unknown is (alias != 'sqlite')
    assert list(statuses(manager)) == ['t_each#0', 't_each#1']
    again = manager.fire('item', event_id=caught.value.event_id)
    assert again.duplicate


def test_a_deadlock_is_told_to_nobody(manager: TriggerManager, alias: str):
    with failing(alias, deadlock, times=3) as failed:
        assert manager.fire('item').released == ['t_each#1']
    assert len(failed) == 3


def test_deadlocks_without_end_are_given_up(manager: TriggerManager, alias: str):
    with failing(alias, deadlock, times=99), pytest.raises(StorageUnavailable) as caught:
        manager.fire('item')
    assert not caught.value.outcome_unknown


def test_a_deadlock_within_a_transaction_is_the_applications_error(
    manager: TriggerManager, alias: str
):
    from django.db import OperationalError, transaction

    with pytest.raises(OperationalError), transaction.atomic(alias):
        with failing(alias, deadlock):
            manager.cancel()


def test_two_transactions_that_wait_for_each_other(postgresql_medium: Medium):
    """A real deadlock: the database ends one of them, which begins again."""
    manager = postgresql_medium.manager(TASKS)
    manager.fire('item')
    manager.fire('item')
    storage: Any = manager.storage
    database = storage._database
    meeting = threading.Barrier(2)
    tries: list[int] = []

    def lock_both(first: str, second: str) -> None:
        def body(t: Any) -> None:
            tries.append(1)
            t.update_row(storage._sid, first, row(first))
            if len(tries) <= 2:
                meeting.wait(10)
            t.update_row(storage._sid, second, row(second))

        database.run(body, write=True)

    from celery_triggers.storages.relational.backend import key

    keys = [key('t_each#0'), key('t_each#1')]

    def row(iid: str) -> Any:
        name = 't_each#0' if iid == keys[0] else 't_each#1'
        return manager.storage._read(_request(name)).rows[name]

    thread = threading.Thread(target=_and_close(lambda: lock_both(keys[1], keys[0])))
    thread.start()
    lock_both(*keys)
    thread.join(20)
    assert not thread.is_alive()
    assert len(tries) == 3


def _request(name: str) -> Any:
    from celery_triggers.storages.records import Request

    return Request(names=[name])


def _and_close(action: Callable[[], Any]) -> Callable[[], None]:
    def act() -> None:
        from django.db import connections

        try:
            action()
        finally:
            connections.close_all()

    return act


def test_a_lock_that_nobody_gives_back_is_not_waited_for_for_ever(
    postgresql_medium: Medium, monkeypatch: pytest.MonkeyPatch
):
    from django.db import connections, transaction

    from celery_triggers.contrib.django import database
    from celery_triggers.contrib.django.models import Session

    monkeypatch.setattr(database, 'LOCK_SECONDS', 0.2)
    manager = postgresql_medium.manager(TASKS)
    manager.fire('item')
    caught: list[Any] = []

    def fire() -> None:
        try:
            manager.fire('item')
        except StorageUnavailable as exc:
            caught.append(exc)
            with connections['postgresql'].cursor() as cursor:
                cursor.execute('SHOW lock_timeout')
                caught.append(cursor.fetchone()[0])

    with transaction.atomic('postgresql'):
        list(Session.objects.using('postgresql').select_for_update())
        thread = threading.Thread(target=_and_close(fire))
        thread.start()
        thread.join(10)
    assert 'lock timeout' in str(caught[0])
    assert not caught[0].outcome_unknown
    assert caught[1] == '0', "the application's own statements wait as they did"


def test_a_locked_file_is_waited_for_as_long_as_the_settings_say(
    sqlite_medium: Medium, monkeypatch: pytest.MonkeyPatch
):
    from django.db import connections

    manager = sqlite_medium.manager(TASKS)
    manager.fire('item')
    lock = sqlite3.connect(connections['sqlite'].settings_dict['NAME'], isolation_level=None)
    lock.execute('BEGIN IMMEDIATE')
    with connections['sqlite'].cursor() as cursor:
        cursor.execute('PRAGMA busy_timeout = 20')
    with pytest.raises(StorageUnavailable, match='locked') as caught:
        manager.fire('item')
    lock.execute('ROLLBACK')
    lock.close()
    connections['sqlite'].close()
    assert not caught.value.outcome_unknown
    manager.fire('item')


def test_missing_tables_say_what_to_do(
    medium: Medium, alias: str, another_database: Callable[..., str], tmp_path: Path
):
    from django.db import transaction

    empty = {
        'sqlite': {'NAME': str(tmp_path / 'empty.sqlite3')},
        'postgresql': {'OPTIONS': {'options': '-c search_path=nowhere'}},
        'mariadb': {'NAME': 'mysql'},
    }[alias]
    name = another_database(**empty)
    manager = medium.manager().__class__(
        medium.storage_class('x', f'django://{name}', application=medium.application(TASKS))
    )
    message = f'migrate celery_triggers --database {name}'
    with pytest.raises(StorageNotConfigured, match=message):
        manager.fire('item')
    with pytest.raises(StorageNotConfigured, match=message), transaction.atomic(name):
        manager.cancel()


@pytest.mark.parametrize(
    ('url', 'settings', 'message'),
    [
        ('django://nowhere', {}, 'no such alias; it has: default'),
        ('django://default', {'triggers_storage_options': {'timeout': 3}}, 'has no options'),
        ('django://default', {'triggers_key_prefix': 'x' * 101}, 'at most 100 characters'),
    ],
)
def test_what_the_settings_cannot_say(
    medium: Medium, url: str, settings: dict[str, Any], message: str
):
    with pytest.raises(StorageNotConfigured, match=message):
        medium.storage_class('x', url, application=medium.application(TASKS, **settings))


# ------------------------------------------------------------------- threads and forks


def in_own_thread(action: Callable[[], Any], name: str = 'celery_triggers-test') -> Any:
    """Do something in a thread as this package names its own."""
    results: list[Any] = []
    thread = threading.Thread(target=_and_close(lambda: results.append(action())), name=name)
    thread.start()
    thread.join(20)
    return results[0]


@pytest.mark.parametrize(('age', 'kept'), [(0, True), (59, True), (61, False)])
def test_a_thread_of_ours_renews_its_connection_every_minute(
    manager: TriggerManager, alias: str, age: int, kept: bool
):
    from django.db import connections

    def look_twice() -> bool:
        manager.storage.load()
        connection = connections[alias]
        before = connection.connection
        connection.close_at -= age
        manager.storage.load()
        return connection.connection is before

    assert in_own_thread(look_twice) is kept
    assert in_own_thread(look_twice, name='of the application'), 'that is for Django to do'


def test_in_an_event_loop_firings_are_awaited(app: Celery):
    from django.core.exceptions import SynchronousOnlyOperation

    async def view() -> bool:
        with pytest.raises(SynchronousOnlyOperation):
            app.triggers.fire('x:1', 'item')
        return (await app.triggers.afire('x:1', 'item')).pending

    assert asyncio.run(view()) is False
    assert list(statuses(app.triggers.session('x:1'))) == ['t_each#0']


def test_a_child_has_a_connection_of_its_own(manager: TriggerManager, alias: str):
    from django.db import connections

    if alias == 'sqlite':
        pytest.skip('it closes connections before')
    manager.fire('item')
    before, number = connections[alias].connection, server_id(alias)

    def act() -> None:
        manager.fire('item')
        assert server_id(alias) != number
        connections.close_all()

    assert in_child(act) == 0
    assert connections[alias].connection is before
    assert server_id(alias) == number, 'nobody has said goodbye for the parent'
    assert len(statuses(manager)) == 3


def test_a_process_may_fork_in_the_middle_of_a_transaction(manager: TriggerManager, alias: str):
    from django.db import connections, transaction

    if alias == 'sqlite':
        pytest.skip('a file that is locked cannot be left to a child')

    def act() -> None:
        manager.fire('item', {'by': 'child'})
        connections.close_all()

    with transaction.atomic(alias):
        manager.fire('item', {'by': 'parent'})
        assert in_child(act) == 0
    received = [instance.kwargs['item'] for instance in manager.storage]
    assert received == [{}, {'by': 'child'}, {'by': 'parent'}]


def test_no_open_file_is_left_to_a_child(sqlite_medium: Medium):
    """Neither of the thread that forks nor of threads of ours."""
    from django.db import connections

    manager = sqlite_medium.manager(TASKS)
    manager.fire('item')
    asked, go_on = threading.Event(), threading.Event()
    seen: list[Any] = []

    def own() -> None:
        manager.storage.load()
        asked.set()
        go_on.wait(20)
        seen.append(connections['sqlite'].connection)
        manager.fire('item')

    thread = threading.Thread(target=_and_close(own), name='celery_triggers-test')
    thread.start()
    assert asked.wait(20)

    def act() -> None:
        manager.fire('item')
        assert len(statuses(manager)) == 2

    assert in_child(act) == 0
    assert connections['sqlite'].connection is None
    go_on.set()
    thread.join(20)
    assert seen == [None]
    assert len(statuses(manager)) == 3


def test_a_pool_of_connections_is_not_shared_with_a_child(
    postgresql_medium: Medium, postgresql: str
):
    pytest.importorskip('psycopg_pool')
    from django import VERSION
    from django.db import connections

    if VERSION < (5, 1):
        pytest.skip('this Django has no pools')
    known = connections.settings['postgresql']
    connections.settings['pooled'] = {
        **known, 'OPTIONS': {**known['OPTIONS'], 'pool': {'min_size': 1, 'max_size': 1}}
    }
    try:
        manager = postgresql_medium.manager().__class__(
            postgresql_medium.storage_class(
                'x', 'django://pooled', application=postgresql_medium.application(TASKS)
            )
        )
        manager.fire('item')
        number = server_id('pooled')
        connections['pooled'].close()

        def act() -> None:
            manager.fire('item')
            assert server_id('pooled') != number

        assert in_child(act) == 0
        manager.fire('item')
        assert server_id('pooled') == number
        assert len(statuses(manager)) == 3
    finally:
        connections['pooled'].close()
        connections['pooled'].close_pool()
        del connections['pooled']
        del connections.settings['pooled']
