"""Sentinels: who is the master is asked, and asked again; what an error tells."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.redis import RedisStorageBackend
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import MASTER, Sentinels, start_sentinels
from tests.redis.storm import patiently
from tests.redis.support import EACH, client_of, traffic


def medium_at(sentinels: Sentinels, **options: Any) -> Medium:
    return Medium(
        'redis', sentinels.url, prefix=f'test-{secrets.token_hex(6)}',
        settings={'triggers_storage_options': options},
    )


@pytest.fixture
def manager(sentinel_medium: Medium) -> TriggerManager:
    found = sentinel_medium.manager(EACH)
    found.fire('a')
    return found


def test_every_operation(sentinel_medium: Medium, manager: TriggerManager):
    place = sentinel_medium.url, sentinel_medium.application().settings
    run = delivery(manager, 't_each#0')
    assert run.claim()
    assert run.finish(None)
    manager.update_configuration({'t_own': {'after': ['b'], 'run': 'x'}})
    assert manager.fire('b').released == ['t_own#0']
    assert statuses(sentinel_medium.manager(EACH)) == {
        't_each#0': 'finished', 't_own#0': 'scheduled',
    }
    assert sentinel_medium.uids() == ['order:1']
    assert [name for _, name, _ in RedisStorageBackend.due_dates(*place)] == ['t_own#0']
    taken = RedisStorageBackend.take_due(*place, limit=64, push=1000, gap=1)
    assert taken.next_at is not None
    assert RedisStorageBackend.gates(*place, ['nobody']) == {}
    assert manager.storage.delete()


def test_a_firing_is_two_round_trips_to_the_master(manager: TriggerManager):
    with traffic() as sent:
        manager.fire('a')
    assert sent.names == [['EVALSHA'], ['EVALSHA']]


def test_a_firing_that_a_replica_confirms_is_two_round_trips_too():
    medium = medium_at(start_sentinels(), wait_replicas=1)
    manager = medium.manager(EACH)
    manager.fire('a')
    with traffic() as sent:
        manager.fire('a')
    assert sent.names == [['EVALSHA', 'SET', 'WAIT']] * 2


def test_replicas_that_there_are_not_confirm_nothing():
    medium = medium_at(start_sentinels(), wait_replicas=2, wait_timeout=0.01)
    with pytest.raises(StorageUnavailable, match='did not confirm.*wait_replicas = 2') as caught:
        medium.manager(EACH).fire('a')
    assert not caught.value.outcome_unknown, 'it was reading'


def test_a_change_that_is_not_confirmed_may_have_happened(
    manager: TriggerManager, monkeypatch: pytest.MonkeyPatch
):
    medium = medium_at(start_sentinels(), wait_replicas=1, wait_timeout=0.01)
    manager, other = medium.manager(EACH), start_sentinels().other
    manager.fire('a')
    storage: Any = manager.storage
    real = storage._commit

    def commit(*args: Any) -> Any:
        other.pause()
        return real(*args)

    monkeypatch.setattr(storage, '_commit', commit)
    try:
        with pytest.raises(StorageUnavailable, match='did not confirm') as caught:
            manager.fire('a', event_id='e')
        assert caught.value.outcome_unknown
        # It is there, but to say so would be to acknowledge it.
        with pytest.raises(StorageUnavailable, match='did not confirm'):
            medium.manager(EACH).fire('a', event_id='e')
    finally:
        other.go_on()
    start_sentinels().settle()
    assert medium.manager(EACH).fire('a', event_id='e').duplicate


def test_a_master_that_is_not_known_is_named():
    sentinels = start_sentinels()
    medium = Medium('redis', sentinels.url.replace(MASTER, 'theirmaster'), prefix='test')
    with pytest.raises(StorageUnavailable, match="No master found for 'theirmaster'") as caught:
        medium.manager(EACH).fire('a')
    assert not caught.value.outcome_unknown


def test_the_other_sentinels_are_asked():
    sentinels = start_sentinels()
    first, *_ = sentinels.sentinels
    nobody = sentinels.url.replace(f':{first.port}', ':1')
    medium = Medium('redis', nobody, prefix=f'test-{secrets.token_hex(6)}')
    assert medium.manager(EACH).fire('a').released == ['t_each#0']


# -------------------------------------------------------- between the read and the commit


def no_master(sentinels: Sentinels, medium: Medium) -> None:
    for sentinel in sentinels.sentinels:
        sentinel.client.execute_command('SENTINEL REMOVE', MASTER)
    client_of(medium).client.connection_pool.disconnect()


def a_replica(sentinels: Sentinels, medium: Medium) -> None:
    sentinels.data[0].client.replicaof('127.0.0.1', sentinels.data[1].port)


def no_replicas(sentinels: Sentinels, medium: Medium) -> None:
    sentinels.data[0].client.config_set('min-replicas-to-write', 2)


def dead(sentinels: Sentinels, medium: Medium) -> None:
    sentinels.data[0].kill()


MEANWHILE: dict[str, tuple[Callable[[Sentinels, Medium], None], bool]] = {
    'no master': (no_master, False),
    'a replica': (a_replica, False),
    'too few replicas': (no_replicas, False),
    # Nobody knows whether the connection broke before or after the master had read it.
    'dead': (dead, True),
}


@pytest.fixture
def one_sentinel() -> Iterator[Sentinels]:
    with Sentinels(1) as found:
        yield found


@pytest.mark.parametrize('meanwhile', MEANWHILE)
def test_what_a_commit_says_that_was_not_made(
    one_sentinel: Sentinels, monkeypatch: pytest.MonkeyPatch, meanwhile: str
):
    medium = medium_at(one_sentinel)
    manager = medium.manager(EACH)
    manager.fire('a')
    interfere, unknown = MEANWHILE[meanwhile]
    storage: Any = manager.storage
    real = storage._commit

    def commit(*args: Any) -> Any:
        interfere(one_sentinel, medium)
        return real(*args)

    monkeypatch.setattr(storage, '_commit', commit)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', event_id='e')
    assert caught.value.outcome_unknown is unknown
    assert 'default@' not in str(caught.value)


# ----------------------------------------------------------------------- a new master


@pytest.mark.parametrize('how', ['killed', 'hung'])
def test_a_new_master_is_found(one_sentinel: Sentinels, how: str):
    medium = medium_at(one_sentinel, socket_timeout=0.3)
    manager, old = medium.manager(EACH), one_sentinel.master
    manager.fire('a', event_id='before')
    old.client.wait(1, 1000)
    if how == 'killed':
        old.kill()
    else:
        old.pause()

    patiently(partial(manager.fire, 'a', event_id='after'))
    one_sentinel.new_master(old)
    for event in ('before', 'after'):
        assert patiently(partial(manager.fire, 'a', event_id=event)).duplicate
    assert patiently(lambda: fired(manager)) == ['a', 'a']
