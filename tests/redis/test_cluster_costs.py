"""What each operation costs a cluster: round trips and commands, counted by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from celery_triggers.manager import TriggerManager
from celery_triggers.manager.firing import fire_all
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import Write
from celery_triggers.storages.redis.backend import SHARDS, RedisStorageBackend
from celery_triggers.storages.redis.server import TEXTS
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.conformance.test_fire_many import into
from celery_triggers.testing.conformance.test_slices import TASKS
from celery_triggers.testing.media import FakeApplication, Medium
from tests.parts.redis_servers import Cluster
from tests.redis.support import UIDS, traffic

#: One round trip to each of three nodes.
EACH_NODE = 3


@pytest.fixture
def application(cluster_medium: Medium) -> FakeApplication:
    return cluster_medium.application(TASKS)


@pytest.fixture
def warm(cluster: Cluster, cluster_medium: Medium, application: FakeApplication) -> Medium:
    """All nodes know the scripts, and each has some sessions."""
    cluster.teach(TEXTS.values())
    fire_all(into(cluster_medium, application, *UIDS))
    return cluster_medium


FIRINGS: dict[str, Callable[[TriggerManager], Any]] = {
    'releases nothing': lambda manager: manager.fire('a'),
    'is heard by nobody': lambda manager: manager.fire('nothing'),
    'creates': lambda manager: manager.fire('item'),
    'has an event id': lambda manager: manager.fire('a', event_id='e'),
}


@pytest.mark.parametrize('firing', FIRINGS)
@pytest.mark.parametrize('uid', ['order:1', 'order:new'])
def test_a_firing_is_two_round_trips_to_one_node(
    warm: Medium, application: FakeApplication, firing: str, uid: str
):
    manager = warm.manager(application, uid)
    with traffic() as sent:
        FIRINGS[firing](manager)
    assert sent.names == [['EVALSHA'], ['EVALSHA']]
    assert len(sent.by_port()) == 1


def test_a_firing_that_releases_a_claim_and_an_outcome(
    warm: Medium, application: FakeApplication
):
    manager = warm.manager(application, 'order:new')
    manager.fire('a')
    with traffic() as sent:
        assert manager.fire('b').released == ['t_join#0']
    assert sent.names == [['EVALSHA'], ['EVALSHA']]
    run = delivery(manager, 't_join#0')
    with traffic() as sent:
        assert run.claim()
    assert sent.names == [['EVALSHA']]
    with traffic() as sent:
        assert run.finish({'n': 1})
    assert sent.names == [['EVALSHA'], ['EVALSHA']]
    assert statuses(manager)['t_next#0'] == 'scheduled'


def test_firings_into_many_sessions_are_two_round_trips_to_each_node(
    cluster: Cluster, warm: Medium, application: FakeApplication
):
    with traffic() as sent:
        fire_all(into(warm, application, *UIDS))
    assert sorted(sent.by_port()) == sorted(node.port for node in cluster.nodes)
    for writes in sent.by_port().values():
        read, commit = writes
        assert read == commit == ['EVALSHA'] * len(read)
    assert sum(len(names) for names in sent.names) == 2 * len(UIDS)


def test_writes_into_many_sessions_are_one_round_trip_to_each_node(
    warm: Medium, application: FakeApplication
):
    storages = [warm.backend(uid, application) for uid in UIDS]
    incarnations = [storage.load().head.incarnation for storage in storages]
    writes: list[tuple[StorageBackend, Write]] = [
        (storage, Write('t_join#0', incarnation, [{'token': 'nobody'}], {'token': 'x'}))
        for storage, incarnation in zip(storages, incarnations, strict=True)
    ]
    with traffic() as sent:
        answers = RedisStorageBackend.write_many(writes)
    assert len(sent.writes) == len(sent.by_port()) == EACH_NODE
    assert [answer[0] for answer in answers] == [False] * len(UIDS)


def test_a_pass_over_what_is_due_is_one_round_trip_to_each_node(
    warm: Medium, application: FakeApplication
):
    with traffic() as sent:
        RedisStorageBackend.take_due(
            warm.url, application.settings, limit=640, push=1000, gap=1
        )
    assert len(sent.writes) == len(sent.by_port()) == EACH_NODE
    assert Counter(name for names in sent.names for name in names) == {'EVALSHA': SHARDS}


def test_looking_for_gates_is_one_round_trip_to_each_node(
    warm: Medium, application: FakeApplication
):
    with traffic() as sent:
        assert RedisStorageBackend.gates(warm.url, application.settings, ['x', 'y']) == {}
    assert len(sent.writes) == len(sent.by_port()) == EACH_NODE
    assert Counter(name for names in sent.names for name in names) == {'HMGET': SHARDS}


def test_listing_sessions_asks_every_node_once_for_a_thousand_keys(
    warm: Medium, application: FakeApplication
):
    with traffic() as sent:
        assert len(warm.uids()) == len(UIDS)
    names = Counter(name for names in sent.names for name in names)
    assert names.pop('CLUSTER') == 1
    assert set(names) == {'SCAN'}
