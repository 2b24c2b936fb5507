"""A firing on the application's own connection: both happen, or neither (SQLAlchemy)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

from celery_triggers.exceptions import (
    CascadeLimitExceeded,
    ClaimLost,
    InvalidFiring,
    TriggersError,
)
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.firing import Run
from celery_triggers.manager.pending import ready
from celery_triggers.storages.sql.dialects import dialect_of
from celery_triggers.sweep import Sweep
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium
from tests import media

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}

SQL = [medium for medium in media.present() if medium.key == 'sql']

#: Not SQLite, which has one writer: a sweep and a worker wait for an open transaction there.
on_a_server = pytest.mark.parametrize(
    'medium', [medium for medium in SQL if medium.name != 'sql-sqlite'], indirect=True,
    ids=lambda medium: medium.name,
)


@pytest.fixture(params=SQL, ids=lambda medium: medium.name)
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    request.param.prepare()
    opened = request.param.open(tmp_path)
    yield opened
    opened.clear()


@pytest.fixture
def manager(medium: Medium) -> TriggerManager:
    manager = medium.manager(EACH)
    # The tables are there by now: SQLite cannot make them while somebody else writes.
    assert not manager.storage.exists
    return manager


@pytest.fixture
def engine(medium: Medium) -> Iterator[sa.Engine]:
    """The application's own engine, with a table of its own."""
    url = sa.make_url(str(medium.url))
    engine = sa.create_engine(dialect_of(url).url(url))
    with engine.begin() as connection:
        connection.execute(sa.text(f'CREATE TABLE {_table()} (id integer)'))
    yield engine
    with engine.begin() as connection:
        connection.execute(sa.text(f'DROP TABLE {_table()}'))
    engine.dispose()


def _table() -> str:
    return f'orders_{os.getpid()}'


def order(connection: Any) -> None:
    connection.execute(sa.text(f'INSERT INTO {_table()} VALUES (1)'))


def orders(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.text(f'SELECT count(*) FROM {_table()}')))


def inbox(manager: TriggerManager) -> int:
    """Return how many committed firings nobody has applied."""
    database: Any = manager.storage._database  # type: ignore[attr-defined]
    with database.engine.connect() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(database.tables.inbox)))


def sweep(manager: TriggerManager) -> Any:
    storage = manager.storage
    return Sweep(storage.application, type(storage), storage.url).run()


# ----------------------------------------------------------------------- both, or neither


def test_both_happen(manager: TriggerManager, engine: sa.Engine):
    with engine.begin() as connection:
        order(connection)
        firing = manager.fire('a', {'n': 1}, connection=connection)
        assert firing.pending
        assert firing.due is None
        assert (firing.created, firing.heard_by) == ([], [])
        assert not manager.storage.exists, 'the session is not touched'
    assert orders(engine) == 1
    assert statuses(manager) == {'t_each#0': 'scheduled'}
    assert manager.storage['t_each#0'].kwargs == {'a': {'n': 1}}
    assert manager.storage.application.released == ['t_each#0']  # type: ignore[attr-defined]
    assert inbox(manager) == 0
    record = manager.storage.history[0]
    assert record.event_id == firing.event_id
    assert abs(firing.at.timestamp() * 1000 - record.at) < 60_000


def test_or_neither(manager: TriggerManager, engine: sa.Engine):
    with engine.connect() as connection:
        order(connection)
        manager.fire('a', connection=connection)
        connection.rollback()
        # The connection goes on to something else, which is no reason to apply it.
        order(connection)
        connection.commit()
    assert orders(engine) == 1
    assert inbox(manager) == 0
    assert sweep(manager).taken == 0
    assert not manager.storage.exists


def test_an_error_of_the_application_takes_it_back(manager: TriggerManager, engine: sa.Engine):
    def fail() -> None:
        with engine.begin() as connection:
            order(connection)
            manager.fire('a', connection=connection)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (orders(engine), inbox(manager)) == (0, 0)
    assert not manager.storage.exists


def test_a_connection_that_is_just_closed_takes_it_back(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.connect() as connection:
        manager.fire('a', connection=connection)
    assert inbox(manager) == 0
    assert not manager.storage.exists


def test_what_a_savepoint_takes_back_is_not_fired(manager: TriggerManager, engine: sa.Engine):
    with engine.begin() as connection:
        manager.fire('a', {'n': 1}, connection=connection)
        savepoint = connection.begin_nested()
        manager.fire('a', {'n': 2}, connection=connection)
        savepoint.rollback()
        with connection.begin_nested():
            manager.fire('a', {'n': 3}, connection=connection)
    assert [r.kwargs for r in manager.storage.history] == [{'n': 1}, {'n': 3}]


@pytest.mark.parametrize('scoped', [False, True])
def test_a_session_of_sqlalchemy(manager: TriggerManager, engine: sa.Engine, scoped: bool):
    maker = sessionmaker(engine)
    session: Any = scoped_session(maker) if scoped else maker()
    order(session)
    manager.fire('a', {'n': 1}, connection=session)
    session.commit()
    manager.fire('a', {'n': 2}, connection=session)
    session.rollback()
    manager.fire('a', {'n': 3}, connection=session)
    session.commit()
    session.close()
    assert [r.kwargs for r in manager.storage.history] == [{'n': 1}, {'n': 3}]
    assert orders(engine) == 1


def test_a_session_within_a_transaction_from_outside(manager: TriggerManager, engine: sa.Engine):
    """As tests of applications do it: the session's commit is none yet."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode='create_savepoint') as session:
            manager.fire('a', connection=session)
            session.commit()
        assert not manager.storage.exists
        outer.rollback()
    assert not manager.storage.exists


def test_firings_of_one_transaction_are_applied_in_their_order(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.begin() as connection:
        for number in range(20):
            manager.fire('a', {'n': number}, connection=connection)
    assert [r.kwargs['n'] for r in manager.storage.history] == list(range(20))


def test_the_sweep_keeps_the_order_too(
    manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    with die_before_applying(monkeypatch), engine.begin() as connection:
        for number in range(20):
            manager.fire('a', {'n': number}, connection=connection)
    assert sweep(manager).fired == 20
    assert [r.kwargs['n'] for r in manager.storage.history] == list(range(20))


def test_a_connection_that_is_not_given_back_applies_it_when_it_begins_again(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.connect() as connection:
        manager.fire('a', connection=connection)
        connection.commit()
        order(connection)
        assert statuses(manager) == {'t_each#0': 'scheduled'}


POOLS: dict[str, dict[str, Any]] = {
    'no pool': {'poolclass': NullPool},
    'one connection': {'poolclass': StaticPool},
    'every statement commits': {'isolation_level': 'AUTOCOMMIT'},
    'serializable': {'isolation_level': 'SERIALIZABLE'},
}


@pytest.mark.parametrize('pool', POOLS)
def test_engines_of_all_kinds(manager: TriggerManager, engine: sa.Engine, pool: str):
    other = sa.create_engine(engine.url, **POOLS[pool])
    with other.begin() as connection:
        manager.fire('a', connection=connection)
    with other.execution_options(logging_token='x').connect() as connection:
        with connection.begin():
            manager.fire('a', connection=connection)
    assert fired(manager) == ['a', 'a']
    other.dispose()


def test_a_connection_that_commits_each_statement(manager: TriggerManager, engine: sa.Engine):
    """Nobody says that a transaction begins, and what seems to be rolled back is there."""
    other = sa.create_engine(engine.url, isolation_level='AUTOCOMMIT')
    with other.connect() as connection:
        assert manager.fire('a', {'n': 1}, connection=connection).pending
    assert [r.kwargs for r in manager.storage.history] == [{'n': 1}]
    with engine.connect().execution_options(isolation_level='AUTOCOMMIT') as connection:
        manager.fire('a', {'n': 2}, connection=connection)
        connection.rollback()
    assert [r.kwargs for r in manager.storage.history] == [{'n': 1}, {'n': 2}]
    other.dispose()


@on_a_server
def test_a_connection_that_breaks_can_be_used_again(manager: TriggerManager, engine: sa.Engine):
    with engine.connect() as connection:
        manager.fire('a', {'n': 1}, connection=connection)
        connection.invalidate()
        connection.rollback()
        manager.fire('a', {'n': 2}, connection=connection)
        connection.commit()
        manager.fire('a', {'n': 3}, connection=connection)
        connection.invalidate()
    assert [r.kwargs for r in manager.storage.history] == [{'n': 2}]


def test_a_connection_that_left_its_pool_leaves_it_to_the_sweep(
    manager: TriggerManager, engine: sa.Engine
):
    connection = engine.connect()
    manager.fire('a', connection=connection)
    connection.commit()
    connection.detach()
    connection.close()
    assert sweep(manager).fired == 1
    assert fired(manager) == ['a']


def test_many_firings_in_one_call(medium: Medium, manager: TriggerManager, engine: sa.Engine):
    from celery import Celery

    app = Celery('shop', broker='memory://', set_as_current=False)
    app.conf.update(
        triggers_storage=medium.url, triggers_key_prefix=medium.prefix, triggers_unheard='ignore'
    )
    with engine.begin() as connection:
        firings = app.triggers.fire_many(  # type: ignore[attr-defined]
            {'uid': 'order:1', 'trigger_name': 'b', 'trigger_kwargs': {'n': number},
             'connection': connection}
            for number in range(3)
        )
        assert all(firing.pending for firing in firings)
    assert [r.kwargs['n'] for r in manager.storage.history] == [0, 1, 2]


# ---------------------------------------------------------------------- committed and killed


class die_before_applying:
    """Commits go through, and nobody applies what they stored: the process died there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch

    def __enter__(self) -> None:
        self.context = self.monkeypatch.context()
        patch = self.context.__enter__()
        patch.setattr('celery_triggers.storages.sql.backend.when_committed', lambda *_: None)

    def __exit__(self, *exc: Any) -> None:
        self.context.__exit__(*exc)


def test_committed_and_killed_is_applied_by_the_sweep_once(
    medium: Medium, manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    with die_before_applying(monkeypatch), engine.begin() as connection:
        manager.fire('a', connection=connection)
    assert inbox(manager) == 1
    assert not manager.storage.exists
    report = sweep(manager)
    assert (report.taken, report.fired, report.errors) == (1, 1, 0)
    assert statuses(manager) == {'t_each#0': 'scheduled'}
    assert inbox(manager) == 0
    assert sweep(manager).fired == 0


def test_killed_between_applying_it_and_forgetting_it(
    manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    storage_class = type(manager.storage)
    with monkeypatch.context() as patch:
        patch.setattr(storage_class, 'forget_firing', lambda *_: None)
        with engine.begin() as connection:
            manager.fire('a', connection=connection)
    assert inbox(manager) == 1
    assert sweep(manager).fired == 1
    assert inbox(manager) == 0
    assert fired(manager) == ['a']
    assert manager.storage.application.released == ['t_each#0']  # type: ignore[attr-defined]


def test_the_sweep_and_the_process_at_the_same_time(
    manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    """The sweep is quicker, between the process's look into the inbox and its commit."""
    storage_class = type(manager.storage)
    real = storage_class.stored_firing

    def slow(storage: Any, id_: str) -> Any:
        found = real(storage, id_)
        monkeypatch.setattr(storage_class, 'stored_firing', real)
        assert sweep(manager).fired == 1
        return found

    monkeypatch.setattr(storage_class, 'stored_firing', slow)
    with engine.begin() as connection:
        manager.fire('a', connection=connection)
    assert fired(manager) == ['a']
    assert statuses(manager) == {'t_each#0': 'scheduled'}
    assert manager.storage.application.released == ['t_each#0']  # type: ignore[attr-defined]


@on_a_server
def test_an_uncommitted_firing_is_nothing_to_a_sweep(medium: Medium, engine: sa.Engine):
    manager = medium.manager(EACH)
    manager.fire('b')
    with engine.begin() as connection:
        manager.fire('a', connection=connection)
        assert sweep(manager).taken == 0
        assert fired(manager) == ['b']
    assert fired(manager) == ['b', 'a']


def test_a_session_that_it_begins_has_the_manager_of_the_process_that_fired(
    medium: Medium, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    manager = medium.manager(EACH, finalizing=True)
    with die_before_applying(monkeypatch), engine.begin() as connection:
        manager.fire('a', connection=connection)
    sweep(manager)
    assert manager.storage.load().head.manager == 'finalizing'


# ---------------------------------------------------------------------------- no lock is held


@on_a_server
def test_a_worker_that_ends_a_task_of_the_session_is_not_held_up(
    medium: Medium, engine: sa.Engine
):
    # Were it held up, it would fail soon.
    impatient = medium.application(EACH, triggers_storage_options={'lock_timeout': 0.5})
    manager = medium.manager(impatient)
    manager.fire('a')
    with engine.begin() as connection:
        manager.fire('a', {'open': True}, connection=connection)
        run = delivery(manager, 't_each#0')
        assert run.claim()
        assert run.finish({'n': 1})
        assert manager.fire('a').released == ['t_each#1']
        manager.update_configuration({'t_more': {'after': ['more'], 'run': 'x'}})
        assert sweep(manager).errors == 0
        manager.storage.delete()
    assert fired(manager) == ['a'], 'its session was deleted; it begins another'


# ------------------------------------------------------------------------- event ids, delays


def test_an_event_id_counts_once_across_transactions(manager: TriggerManager, engine: sa.Engine):
    for _ in range(2):
        with engine.begin() as connection:
            manager.fire('a', event_id='e', connection=connection)
    assert manager.fire('a', event_id='e').duplicate
    assert fired(manager) == ['a']
    assert inbox(manager) == 0


@on_a_server
def test_two_open_transactions_with_one_event_id_do_not_wait_for_each_other(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.connect() as one, engine.connect() as other:
        manager.fire('a', event_id='e', connection=one)
        manager.fire('a', event_id='e', connection=other)
        one.commit()
        other.commit()
    assert fired(manager) == ['a']
    assert inbox(manager) == 0


def test_an_event_id_that_stands_for_something_else_is_logged_and_forgotten(
    manager: TriggerManager, engine: sa.Engine, caplog: pytest.LogCaptureFixture
):
    manager.fire('a', event_id='e')
    with caplog.at_level(logging.ERROR), engine.begin() as connection:
        manager.fire('b', event_id='e', connection=connection)
    assert fired(manager) == ['a']
    assert inbox(manager) == 0
    assert 'refused now that its transaction is committed' in caplog.text


def test_a_delay_counts_from_the_firing(manager: TriggerManager, engine: sa.Engine):
    with engine.begin() as connection:
        firing = manager.fire('a', countdown=3600, connection=connection)
        assert firing.due is not None
        assert (firing.due - firing.at).total_seconds() == 3600
    assert statuses(manager) == {}
    delayed = manager.storage.load().delayed[firing.event_id]
    assert delayed.due == int(firing.due.timestamp() * 1000 + 0.5)
    assert firing.cancel()
    assert not firing.cancel()


def test_an_eta(manager: TriggerManager, engine: sa.Engine):
    eta = datetime.now(timezone.utc) + timedelta(hours=1)
    with engine.begin() as connection:
        late = manager.fire('a', {'late': 1}, eta=eta, connection=connection)
        manager.fire('a', {'past': 1}, eta=eta - timedelta(hours=2), connection=connection)
    assert fired(manager) == ['a']
    assert late.due is not None
    assert abs((late.due - eta).total_seconds()) < 0.002


def test_what_is_not_committed_cannot_be_cancelled(manager: TriggerManager, engine: sa.Engine):
    manager.fire('b')
    with engine.connect() as connection:
        firing = manager.fire('a', connection=connection)
        with pytest.raises(TriggersError, match='roll that back'):
            firing.cancel()
        connection.commit()
    assert not firing.cancel(), 'it was applied'


def test_a_deleted_session_takes_what_was_committed_with_it(
    manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
):
    manager.fire('b')
    with die_before_applying(monkeypatch), engine.begin() as connection:
        manager.fire('a', connection=connection)
    assert manager.storage.delete()
    assert inbox(manager) == 0
    assert sweep(manager).fired == 0
    assert not manager.storage.exists


def test_a_storage_that_is_down_after_the_commit_leaves_it_to_the_sweep(
    manager: TriggerManager, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def down(*_: Any) -> Any:
        raise TriggersError('down')

    with monkeypatch.context() as patch:
        patch.setattr(type(manager.storage), 'stored_firing', down)
        with engine.begin() as connection:
            manager.fire('a', connection=connection)
    assert 'left to the sweep' in caplog.text
    assert sweep(manager).fired == 1
    assert fired(manager) == ['a']


# ------------------------------------------------------------------- what a run of a task fires


def run_of(manager: TriggerManager, name: str, token: str) -> Run:
    instance = manager.storage[name]
    incarnation = manager.storage.load().head.incarnation
    return Run(name, str(instance.task_id), instance.attempt, incarnation, token)


@on_a_server
def test_a_run_may_end_before_its_transaction_does(manager: TriggerManager, engine: sa.Engine):
    manager.fire('a')
    run = delivery(manager, 't_each#0')
    run.claim()
    with engine.begin() as connection:
        firing = ready(
            manager, 'b', event_id='r', connection=connection,
            run=run_of(manager, 't_each#0', run.token),
        )
        assert firing.make().pending
        run.finish(None)
    assert fired(manager) == ['a', 't_each', 'b']


def test_a_run_that_lost_its_claim_stores_nothing(manager: TriggerManager, engine: sa.Engine):
    manager.fire('a')
    delivery(manager, 't_each#0').claim()
    with engine.begin() as connection:
        stale = ready(
            manager, 'b', connection=connection, run=run_of(manager, 't_each#0', 'another')
        )
        with pytest.raises(ClaimLost):
            stale.make()
    assert fired(manager) == ['a']
    assert inbox(manager) == 0


@on_a_server
def test_a_loop_of_runs_is_stopped_within_transactions_too(medium: Medium, engine: sa.Engine):
    loop = {'t_loop': {'andEvery': 'a', 'run': 'x'}}
    manager = medium.manager(loop, triggers_max_cascade=3)
    manager.fire('a')
    for number in range(3):
        run = delivery(manager, f't_loop#{number}')
        run.claim()
        with engine.begin() as connection:
            ready(
            manager,     'a', connection=connection,
                run=run_of(manager, f't_loop#{number}', run.token),
            ).make()
        run.finish(None)
    run = delivery(manager, 't_loop#3')
    run.claim()
    with engine.begin() as connection, pytest.raises(CascadeLimitExceeded):
        ready(
            manager, 'a', connection=connection, run=run_of(manager, 't_loop#3', run.token)
        ).make()


# --------------------------------------------------------------------------------- refusals


def test_a_connection_to_another_database_is_refused(
    manager: TriggerManager, tmp_path: Path, medium: Medium
):
    # What SQLite does not know in its URL it ignores; other drivers take a password there.
    other = sa.create_engine(f'sqlite:///file:{tmp_path}/other.db?uri=true&password=secret')
    with other.begin() as connection, pytest.raises(InvalidFiring) as refused:
        manager.fire('a', connection=connection)
    assert 'where the sessions are not' in str(refused.value)
    assert 'secret' not in str(refused.value)
    # Also one that has sessions of its own.
    medium_there = Medium('sql', f'sqlite:///{tmp_path}/other.db', prefix=medium.prefix)
    medium_there.manager(EACH).fire('a')
    with other.begin() as connection, pytest.raises(InvalidFiring, match='where the sessions'):
        manager.fire('a', connection=connection)
    other.dispose()
    assert not manager.storage.exists


@pytest.mark.parametrize('thing', ['a string', 42, object()])
def test_what_is_no_connection_is_refused(manager: TriggerManager, thing: Any):
    with pytest.raises(InvalidFiring, match='Connection or a Session'):
        manager.fire('a', connection=thing)


def test_an_asynchronous_connection_is_refused_with_a_hint(manager: TriggerManager):
    asyncio = pytest.importorskip('sqlalchemy.ext.asyncio')
    with pytest.raises(InvalidFiring, match='run_sync'):
        manager.fire('a', connection=asyncio.AsyncSession())


@pytest.mark.parametrize('key', ['memory', 'redis'])
def test_other_storages_say_that_they_cannot(key: str, tmp_path: Path, engine: sa.Engine):
    manager = media.named(key).open(tmp_path).manager(EACH)
    with engine.begin() as connection, pytest.raises(InvalidFiring, match="'sql' and 'django'"):
        manager.fire('a', connection=connection)


def test_bad_input_is_refused_before_anything_is_stored(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.begin() as connection:
        for arguments in (('', {}), ('a:failed', {}), ('a', {'x': object()}), ('a', [1])):
            with pytest.raises(InvalidFiring):
                manager.fire(*arguments, connection=connection)
    assert inbox(manager) == 0


def test_a_firing_is_one_look_at_the_clock_and_one_insert(
    manager: TriggerManager, engine: sa.Engine
):
    with engine.begin() as connection:
        manager.fire('a', connection=connection)
    sent: list[str] = []
    sa.event.listen(
        engine, 'before_cursor_execute', lambda *args: sent.append(args[2].split()[0])
    )
    with engine.begin() as connection:
        manager.fire('a', connection=connection)
    assert sent == ['SELECT', 'INSERT']


