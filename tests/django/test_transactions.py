"""What changes inside ``transaction.atomic()`` is part of that transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from celery import Celery, signature

from celery_triggers import gate
from celery_triggers.exceptions import InvalidFiring, TriggersError
from celery_triggers.manager import TriggerManager, pending
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.records import Request
from celery_triggers.testing.conformance.support import (
    application_of,
    delivery,
    fired,
    statuses,
)
from celery_triggers.testing.conformance.test_contract import commit, content, row
from celery_triggers.testing.media import Medium
from tests.django.conftest import TASKS
from tests.parts.waiting import eventually


class Undone(Exception):
    """Rolls a transaction back."""


@contextmanager
def undone(alias: str) -> Iterator[None]:
    """A transaction, or a savepoint in one, that is rolled back."""
    from django.db import transaction

    with suppress(Undone), transaction.atomic(alias):
        yield
        raise Undone


@pytest.fixture
def manager(medium: Medium) -> TriggerManager:
    return medium.manager(TASKS)


@pytest.fixture
def atomic(alias: str) -> Iterator[Callable[..., Any]]:
    from django.contrib.auth.models import Group
    from django.db import transaction

    yield lambda **options: transaction.atomic(alias, **options)
    Group.objects.using(alias).all().delete()


def own_rows(alias: str) -> list[str]:
    """The names of the application's own rows."""
    from django.contrib.auth.models import Group

    return list(Group.objects.using(alias).order_by('name').values_list('name', flat=True))


def write_own(alias: str, name: str) -> None:
    from django.contrib.auth.models import Group

    Group.objects.using(alias).create(name=name)


def stored(alias: str) -> int:
    from celery_triggers.contrib.django.models import Inbox

    return int(Inbox.objects.using(alias).count())


def in_thread(action: Callable[[], Any]) -> Any:
    """Do something on another connection; fail if it waits for this one."""
    from django.db import connections

    results: list[Any] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as exc:
            results.append(exc)
        finally:
            connections.close_all()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(8)
    assert results, 'it waits'
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# -------------------------------------------------------------------------- firing


def test_a_firing_is_applied_after_the_commit(
    manager: TriggerManager, atomic: Any, alias: str
):
    with atomic():
        write_own(alias, 'order')
        firing = manager.fire('item', {'n': 1})
        assert firing.pending
        assert not manager.storage.exists
        assert stored(alias) == 1
        assert application_of(manager).released == []
    assert own_rows(alias) == ['order']
    assert application_of(manager).released == ['t_each#0']
    assert manager.storage['t_each#0'].kwargs == {'item': {'n': 1}}
    assert stored(alias) == 0


def test_a_firing_that_is_rolled_back_never_happened(
    manager: TriggerManager, atomic: Any, alias: str
):
    with undone(alias):
        write_own(alias, 'order')
        manager.fire('item')
    assert own_rows(alias) == []
    assert not manager.storage.exists
    assert stored(alias) == 0
    assert application_of(manager).released == []


def test_a_savepoint_that_is_rolled_back_takes_its_firings_along(
    manager: TriggerManager, atomic: Any, alias: str
):
    with atomic():
        manager.fire('item', {'n': 1})
        with undone(alias):
            manager.fire('item', {'n': 2})
        manager.fire('item', {'n': 3})
    assert [i.kwargs['item']['n'] for i in manager.storage] == [1, 3]
    assert stored(alias) == 0


def test_an_inner_block_waits_for_the_outer_one(manager: TriggerManager, atomic: Any):
    with atomic():
        with atomic():
            manager.fire('item')
        assert application_of(manager).released == []
        with atomic(savepoint=False):
            manager.fire('item')
        assert application_of(manager).released == []
    assert application_of(manager).released == ['t_each#0', 't_each#1']


def test_a_firing_is_no_part_of_a_transaction_on_another_alias(
    manager: TriggerManager, alias: str
):
    from django.db import transaction

    from tests.django import databases

    databases.prepare('default')
    with transaction.atomic('default'):
        assert not manager.fire('item').pending
        assert application_of(manager).released == ['t_each#0']


def test_the_connection_of_a_firing_may_be_named(
    manager: TriggerManager, atomic: Any, alias: str
):
    assert not manager.fire('item', connection=alias).pending, 'there is no transaction'
    with atomic():
        assert manager.fire('item', connection=alias).pending
    assert statuses(manager) == {'t_each#0': 'scheduled', 't_each#1': 'scheduled'}


@pytest.mark.parametrize('connection', ['default', 'nowhere', 7, object()])
def test_another_connection_is_refused(manager: TriggerManager, connection: Any):
    with pytest.raises(InvalidFiring, match='alias'):
        manager.fire('item', connection=connection)
    assert not manager.storage.exists


def test_a_delayed_firing_counts_from_when_it_was_fired(manager: TriggerManager, atomic: Any):
    with atomic():
        firing = manager.fire('item', countdown=3600)
        assert firing.pending
    assert statuses(manager) == {}
    assert list(manager.storage.load().delayed) == [firing.event_id]
    assert firing.cancel()


def test_many_firings_in_one_transaction(
    app: Celery, atomic: Any, alias: str, handed: list[str]
):
    with atomic():
        firings = app.triggers.fire_many(
            [('x:1', 'item'), ('x:2', 'item'), ('x:1', 'item')]
        )
        assert [firing.pending for firing in firings] == [True] * 3
        assert handed == []
    assert sorted(handed) == ['t_each#0', 't_each#0', 't_each#1']
    with undone(alias):
        app.triggers.fire_many([('x:3', 'item'), ('x:4', 'item')])
    assert sorted(app.triggers.sessions()) == ['x:1', 'x:2']


def test_an_event_that_is_fired_twice_is_applied_once(manager: TriggerManager, atomic: Any):
    with atomic():
        manager.fire('item', event_id='e')
        manager.fire('item', event_id='e')
    assert list(statuses(manager)) == ['t_each#0']


def test_what_a_killed_process_committed_the_sweep_applies(
    app: Celery, atomic: Any, alias: str, handed: list[str]
):
    from django.db import connections

    with atomic():
        app.triggers.fire('x:1', 'item', {'n': 1})
        # As if it died right after the commit.
        connections[alias].run_on_commit.clear()
    assert handed == []
    assert stored(alias) == 1
    report = app.triggers.sweep()
    assert report.taken == 1
    assert handed == ['t_each#0']
    assert stored(alias) == 0
    assert app.triggers.sweep().taken == 0


def test_a_firing_that_cannot_be_applied_does_not_harm_what_else_follows_the_commit(
    manager: TriggerManager, atomic: Any, alias: str, monkeypatch: pytest.MonkeyPatch
):
    from django.db import transaction

    called: list[str] = []

    def broken(id_: str) -> None:
        raise TriggersError('not now')

    monkeypatch.setattr(pending, 'apply_stored', broken)
    with atomic():
        manager.fire('item')
        transaction.on_commit(lambda: called.append('own'), using=alias)
    assert called == ['own']
    assert stored(alias) == 1


def test_a_deleted_session_takes_its_stored_firings_along(
    manager: TriggerManager, atomic: Any, alias: str
):
    from django.db import connections

    manager.fire('a')
    with atomic():
        manager.fire('item')
        connections[alias].run_on_commit.clear()
    manager.storage.delete()
    assert stored(alias) == 0


# ------------------------------------------------------------------ other changes


@trigger_managers.register('django-hooks')
class Hooked(TriggerManager):
    """Notes its hooks."""

    calls: list[tuple[str, ...]] = []

    def _post_fire(self, trigger_name: str, tasks_scheduled: list[Any]) -> None:
        self.calls.append(('fire', trigger_name, *(i.name for i in tasks_scheduled)))

    def _post_replay(self, task_instance: Any) -> None:
        self.calls.append(('replay', task_instance.name))

    def _post_skip(self, task_instance: Any, cascade: bool) -> None:
        self.calls.append(('skip', task_instance.name))


@pytest.fixture
def failed(medium: Medium) -> TriggerManager:
    """A session with an instance that failed."""
    manager = Hooked(medium.backend(application=medium.application(TASKS)))
    manager.fire('item')
    run = delivery(manager, 't_each#0')
    run.claim()
    run.fail('it raised', {'type': 'ValueError', 'message': '', 'traceback': '', 'context': {}})
    application_of(manager).releases.clear()
    Hooked.calls.clear()
    return manager


CHANGES: dict[str, Callable[[TriggerManager], Any]] = {
    'replay': lambda m: m.replay_failed_instance('t_each#0'),
    'skip': lambda m: m.skip_failed_instance('t_each#0'),
    'skip with cascade': lambda m: m.skip_failed_instance('t_each#0', cascade=True),
    'cancel': lambda m: m.cancel(),
    'update_configuration': lambda m: m.update_configuration(
        {'t_new': {'after': ['item'], 'run': 'x'}}, apply_past=True
    ),
    'create': lambda m: m.create_instance('t_join'),
    'status': lambda m: m.update_instance_status('t_each#0', 'skipped'),
    'start': lambda m: m.start(),
    'delete': lambda m: m.storage.delete(),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_that_is_rolled_back_left_nothing(
    failed: TriggerManager, alias: str, change: str
):
    before = content(failed.storage._read(Request(whole=True)))
    with undone(alias):
        CHANGES[change](failed)
        assert application_of(failed).released == []
    assert content(failed.storage._read(Request(whole=True))) == before
    assert application_of(failed).released == []
    assert Hooked.calls == []


@pytest.mark.parametrize(
    ('change', 'released', 'calls'),
    [
        ('replay', ['t_each#1'], [('replay', 't_each#1')]),
        ('skip', [], [('skip', 't_each#0')]),
        ('update_configuration', ['t_new#0'], []),
    ],
)
def test_messages_and_hooks_wait_for_the_commit(
    failed: TriggerManager, atomic: Any, change: str, released: list[str], calls: list[Any]
):
    with atomic():
        with atomic():
            CHANGES[change](failed)
        assert application_of(failed).released == []
        assert Hooked.calls == []
    assert application_of(failed).released == released
    assert Hooked.calls == calls


def test_a_change_within_the_transaction_sees_those_before_it(
    failed: TriggerManager, atomic: Any
):
    with atomic():
        replayed = failed.replay_failed_instance('t_each#0')
        failed.update_instance_status(replayed, 'skipped')
        assert statuses(failed) == {'t_each#0': 'replayed', 't_each#1': 'skipped'}
    assert application_of(failed).released == ['t_each#1']


def test_a_session_is_deleted_within_a_transaction(app: Celery, atomic: Any, alias: str):
    app.triggers.fire('x:1', 'item')
    with undone(alias):
        assert app.triggers.delete('x:1')
    assert app.triggers.session('x:1').storage.exists
    with atomic():
        assert app.triggers.delete('x:1')
    assert not app.triggers.session('x:1').storage.exists


def test_whoever_waits_for_a_gate_is_told_before_its_session_is_deleted(
    app: Celery, atomic: Any
):
    gate(signature('any', app=app), after=['never'], uid='x:1').apply_async()
    with atomic(), pytest.raises(TriggersError, match='until your transaction is committed'):
        app.triggers.delete('x:1')
    assert app.triggers.session('x:1').storage.load().head.cancelled == 'deleted'
    assert app.triggers.delete('x:1')


def test_a_conflict_leaves_the_transaction_usable(
    manager: TriggerManager, atomic: Any, alias: str
):
    manager.fire('a')
    storage = manager.storage
    with atomic():
        write_own(alias, 'before')
        refused = [
            # The session is there; the version is another one; a row is there.
            commit('', 'v2'), commit('v0', 'v2'),
            commit(storage._read(Request()).version, 'v2', rows={'t_join#0': row()}),
        ]
        for one in refused:
            assert storage._commit(one, Request()) is not None
        write_own(alias, 'after')
        manager.cancel()
    assert own_rows(alias) == ['after', 'before']
    assert manager.storage.load().head.cancelled == 'by hand'


def test_a_conflict_with_another_process_is_decided_again(
    manager: TriggerManager, medium: Medium, atomic: Any, alias: str
):
    if alias == 'sqlite':
        pytest.skip('its one writer waits for the end of this transaction')
    manager.fire('a')
    other = medium.manager(TASKS)
    real: Any = manager.storage._commit

    def late(*args: Any) -> Any:
        manager.storage._commit = real  # type: ignore[method-assign]
        in_thread(lambda: other.fire('item'))
        return real(*args)

    with atomic():
        manager.storage._commit = late  # type: ignore[method-assign]
        manager.cancel()
    assert statuses(manager) == {'t_each#0': 'scheduled', 't_join#0': 'abandoned'}


def test_without_autocommit_nothing_changes(manager: TriggerManager, alias: str):
    """There is no moment at which to send what a change released."""
    from django.db import connections

    connections[alias].set_autocommit(False)
    try:
        with pytest.raises(TriggersError, match='autocommit is off'):
            manager.fire('item')
    finally:
        connections[alias].rollback()
        connections[alias].set_autocommit(True)
    assert not manager.storage.exists


# ----------------------------------------------------------- who waits for whom


def test_an_outcome_does_not_wait_for_a_caller_that_has_fired(
    manager: TriggerManager, medium: Medium, atomic: Any, alias: str
):
    """A worker ends a task of the session, a new firing comes, while the caller dawdles."""
    if alias == 'sqlite':
        pytest.skip('it has one writer')
    manager.fire('item')
    other = medium.manager(TASKS)
    with atomic():
        manager.fire('item', {'n': 'later'})
        run = in_thread(lambda: delivery(other, 't_each#0'))
        assert in_thread(run.claim)
        assert in_thread(lambda: run.finish({'done': True}))
        in_thread(lambda: other.fire('item', {'n': 'meanwhile'}))
        assert in_thread(lambda: other.storage.take_due(
            medium.url, other.storage.settings, limit=10, push=1, gap=1
        )).entries == []
        assert in_thread(other.storage.delete)
    assert [i.kwargs['item'] for i in manager.storage] == [{'n': 'later'}]


def test_a_session_that_is_changed_is_locked_until_the_commit(postgresql_medium: Medium):
    """Not so with a firing: so prefer those in transactions that take long."""
    from django.db import connections, transaction

    manager, other = postgresql_medium.manager(TASKS), postgresql_medium.manager(TASKS)
    manager.fire('a')
    backends: list[int] = []

    def fire() -> None:
        connection = connections['postgresql']
        connection.ensure_connection()
        backends.append(connection.connection.info.backend_pid)
        other.fire('b')
        connection.close()

    def waits() -> bool:
        with connections['postgresql'].cursor() as cursor:
            cursor.execute('SELECT cardinality(pg_blocking_pids(%s))', backends)
            return bool(cursor.fetchone()[0])

    thread = threading.Thread(target=fire, daemon=True)
    with transaction.atomic('postgresql'):
        manager.update_instance_metadata('t_join#0', {'seen': True})
        thread.start()
        eventually(lambda: backends and waits(), 'the firing waits')
    thread.join(10)
    assert fired(manager) == ['a', 'b']
