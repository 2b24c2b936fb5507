"""A cluster: every operation over all nodes, slots that move, scripts that are forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.manager.firing import fire_all
from celery_triggers.storages.redis import RedisStorageBackend
from celery_triggers.storages.redis import cluster as redis_cluster
from celery_triggers.storages.redis import server as redis_server
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.conformance.test_fire_many import into
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Cluster
from tests.parts.servers import CONFORMANCE_DB, redis_url
from tests.parts.waiting import eventually
from tests.redis.storm import patiently
from tests.redis.support import EACH, UIDS, base_of, slot_of, traffic, uids_at

# -------------------------------------------------------------------- all the nodes


def test_sessions_are_spread_over_the_nodes_and_found_again(
    cluster: Cluster, cluster_medium: Medium
):
    fire_all(into(cluster_medium, cluster_medium.application(EACH), *UIDS))
    assert sorted(cluster_medium.uids()) == sorted(UIDS)
    wanted = ['order:19', *(f'order:19{digit}' for digit in range(10))]
    assert sorted(cluster_medium.uids('order:19')) == wanted
    for node in cluster.nodes:
        assert len(list(node.client.scan_iter(f'{cluster_medium.prefix}:*:s:*'))) > 30


def test_what_is_due_is_taken_from_all_the_nodes(cluster_medium: Medium):
    application = cluster_medium.application(EACH, triggers_dispatch_grace=0.1)
    fire_all(into(cluster_medium, application, *UIDS))
    place = cluster_medium.url, application.settings
    due = {(uid, 't_each#0') for uid in UIDS}
    assert {(uid, name) for uid, name, _ in RedisStorageBackend.due_dates(*place)} == due
    seen: list[tuple[str, str]] = []

    def take() -> bool:
        found = RedisStorageBackend.take_due(*place, limit=640, push=60_000, gap=1)
        seen.extend((one.uid, one.name) for one in found.entries)
        return len(seen) >= len(due)

    eventually(take, 'every due date')
    assert sorted(seen) == sorted(due)


def test_an_application(cluster_medium: Medium):
    app = Celery('shop', broker='memory://', task_cls='celery_triggers:TriggerTask')
    app.conf.update(
        task_always_eager=True, triggers_storage=cluster_medium.url,
        triggers_key_prefix=cluster_medium.prefix,
    )
    ran: list[str] = []

    @app.trigger_task(after=['paid', 'packed'], sessions='order:')
    def ship(context: Any) -> None:
        ran.append(context.uid)

    for trigger in ('paid', 'packed'):
        app.triggers.fire_many([(uid, trigger) for uid in UIDS[:20]])
    assert sorted(ran) == sorted(UIDS[:20])
    assert {app.triggers.session(uid).storage['t_ship#0'].status for uid in ran} == {'finished'}
    assert app.triggers.sweep().taken == 0


def test_prefixes_never_meet(cluster_medium: Medium):
    cluster_medium.manager(EACH).fire('a')
    other = Medium('redis', cluster_medium.url, prefix=f'{cluster_medium.prefix}-other')
    assert other.uids() == []
    assert statuses(other.manager(EACH)) == {}


def test_one_server_is_no_cluster():
    place = redis_url(CONFORMANCE_DB).removeprefix('redis://').partition('/')[0]
    with pytest.raises(StorageNotConfigured, match='no cluster.*redis://'):
        Medium('redis', f'redis+cluster://{place}').manager(EACH).fire('a')


def test_a_cluster_that_is_down_changes_nothing():
    with Cluster(nodes=1) as gone:
        known = Medium('redis', gone.url, prefix='test')
        known.manager(EACH).fire('a')
    unknown = Medium('redis', gone.url.replace('://', '://me:secret@'), prefix='test')
    for medium in (known, unknown):
        with pytest.raises(StorageUnavailable) as caught:
            medium.manager(EACH).fire('a')
        assert not caught.value.outcome_unknown
        assert caught.value.event_id
        assert 'secret' not in str(caught.value)
        with pytest.raises(StorageUnavailable):
            medium.uids()


# ------------------------------------------------------------------------- scripts


def test_nodes_that_have_forgotten_the_scripts_are_told_again(
    cluster: Cluster, cluster_medium: Medium
):
    application = cluster_medium.application(EACH)

    def forget() -> None:
        for node in cluster.nodes:
            node.client.script_flush()

    forget()
    assert cluster_medium.manager(application).fire('a').released == ['t_each#0']
    forget()
    found = fire_all(into(cluster_medium, application, *UIDS[50:100]))
    assert [firing.released for firing in found] == [['t_each#0']] * 50
    forget()
    taken = RedisStorageBackend.take_due(
        cluster_medium.url, application.settings, limit=64, push=1000, gap=1
    )
    assert taken.next_at is not None


# ---------------------------------------------------------------- slots that move


class Move:
    """The slot of ``order:1`` on its way from its node to the next one."""

    def __init__(self, cluster: Cluster, medium: Medium):
        self.cluster, self.medium, self.slot = cluster, medium, slot_of(medium)
        self.here = cluster.owner(self.slot)
        self.there = next(node for node in cluster.nodes if node is not self.here)
        self._under_way = False

    def begin(self) -> None:
        self.cluster.begin_move(self.slot, self.there)
        self._under_way = True

    def send(self, *keys: str) -> None:
        """Send keys of the shard, named by what follows its base."""
        base = base_of(self.medium)
        self.cluster.move_keys(self.slot, self.there, *(f'{base}:{key}' for key in keys))

    def end(self) -> None:
        if self._under_way:
            self.cluster.end_move(self.slot, self.there)
            self._under_way = False


@pytest.fixture
def move(cluster: Cluster, cluster_medium: Medium) -> Iterator[Move]:
    """A move that has not begun; all nodes know the scripts, the session has fired once."""
    cluster.teach(redis_server.TEXTS.values())
    cluster_medium.manager(EACH).fire('a')
    found = Move(cluster, cluster_medium)
    yield found
    found.end()


def test_a_slot_that_has_moved_is_looked_for_once(move: Move):
    manager = move.medium.manager(EACH)
    move.begin()
    move.end()
    with traffic() as sent:
        manager.fire('a')
        manager.fire('a')
    assert [port for port, _ in sent.writes] == [move.here.port, *[move.there.port] * 4]
    assert list(statuses(manager)) == ['t_each#0', 't_each#1', 't_each#2']


def test_one_slot_of_many_that_has_moved_holds_up_no_other(move: Move):
    application = move.medium.application(EACH)
    fire_all(into(move.medium, application, *UIDS))
    move.begin()
    move.end()
    moved = [uid for uid in UIDS if slot_of(move.medium, uid) == move.slot]
    with traffic() as sent:
        fire_all(into(move.medium, application, *UIDS))
    # A read and a commit for each node, and the read that was redirected.
    assert len(sent.writes) == 2 * 3 + 1
    assert len(sent.writes[3][1]) == len(moved)
    assert len(statuses(move.medium.manager(application, moved[0]))) >= 2


def pauses(monkeypatch: pytest.MonkeyPatch, hook: Callable[[int], Any]) -> list[float]:
    """Call ``hook`` with the number of each pause, which is not made."""
    made: list[float] = []

    def pause(seconds: float) -> None:
        made.append(seconds)
        hook(len(made))

    monkeypatch.setattr(redis_cluster, 'time', SimpleNamespace(sleep=pause))
    return made


def test_a_slot_on_its_way_is_waited_for(move: Move, monkeypatch: pytest.MonkeyPatch):
    move.begin()
    move.send('s:order:1')
    made = pauses(monkeypatch, lambda number: move.end() if number == 3 else None)
    assert move.medium.manager(EACH).fire('a').released == ['t_each#1']
    assert len(made) == 3


def test_a_slot_on_its_way_for_too_long_refuses_and_nothing_has_happened(
    move: Move, monkeypatch: pytest.MonkeyPatch
):
    manager = move.medium.manager(EACH)
    move.begin()
    move.send('s:order:1')
    made = pauses(monkeypatch, lambda number: None)
    with pytest.raises(StorageUnavailable, match='refused') as caught:
        manager.fire('a', event_id='e')
    assert not caught.value.outcome_unknown
    assert sum(made) == sum(redis_cluster.PAUSES)
    move.end()
    assert fired(manager) == ['a']
    assert not manager.fire('a', event_id='e').duplicate


def test_a_commit_that_meets_a_slot_on_its_way_says_that_nothing_has_happened(
    move: Move, monkeypatch: pytest.MonkeyPatch
):
    manager = move.medium.manager(EACH)
    storage: Any = manager.storage
    real = storage._commit

    def commit(*args: Any) -> Any:
        move.begin()
        move.send('s:order:1')
        return real(*args)

    monkeypatch.setattr(storage, '_commit', commit)
    pauses(monkeypatch, lambda number: None)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a')
    assert not caught.value.outcome_unknown
    move.end()
    assert fired(move.medium.manager(EACH)) == ['a']


@pytest.mark.parametrize('forgotten', [False, True])
def test_what_has_all_its_keys_at_the_new_node_is_asked_for_there(move: Move, forgotten: bool):
    """Each of these takes one key, or two that both have gone ahead."""
    application = move.medium.application(EACH)
    run = delivery(move.medium.manager(application), 't_each#0')
    place = move.medium.url, application.settings
    storage: Any = move.medium.backend('order:1', application)
    digest = storage.load().head.digest
    RedisStorageBackend.take_due(*place, limit=64, push=1000, gap=1)
    move.begin()
    move.send('s:order:1', 'd', 'z', f'c:{digest}')
    if forgotten:
        move.there.client.script_flush()
    with traffic() as sent:
        assert run.claim()
    words = ['EVALSHA', 'ASKING EVALSHA', *(['ASKING EVAL'] if forgotten else [])]
    assert [' '.join(names) for names in sent.names] == words
    assert RedisStorageBackend.take_due(*place, limit=64, push=1000, gap=1).next_at is not None
    assert [uid for uid, *_ in RedisStorageBackend.due_dates(*place)] == ['order:1']
    assert storage._configuration(digest) is not None
    assert RedisStorageBackend.gates(*place, ['nobody']) == {}
    assert move.medium.uids() == ['order:1']
    move.end()
    assert statuses(run.manager) == {'t_each#0': 'running'}


# ---------------------------------------------------------------- nodes that are gone


def served(medium: Medium, uid: str, event: str) -> bool:
    """Fire with an event id; tell whether that went well."""
    try:
        medium.manager(EACH, uid).fire('a', event_id=event)
    except StorageUnavailable:
        return False
    return True


@pytest.mark.parametrize('how', ['killed', 'hung'])
def test_another_node_takes_over(own_cluster: Cluster, how: str):
    medium = Medium(
        'redis', own_cluster.url, prefix='test',
        settings={'triggers_storage_options': {'socket_timeout': 0.3}},
    )
    node = own_cluster.nodes[0]
    gone, *_ = uids_at(medium, own_cluster, node)
    other, *_ = uids_at(medium, own_cluster, own_cluster.nodes[1])
    for uid in (gone, other):
        assert served(medium, uid, 'before')
    replica = own_cluster.replicas[0]
    eventually(lambda: replica.client.execute_command('DBSIZE') == node.client.dbsize())
    if how == 'killed':
        node.kill()
    else:
        node.pause()
    assert served(medium, other, 'meanwhile'), 'the others go on'
    eventually(lambda: served(medium, gone, 'after'), 'the replica')
    assert replica.info('replication')['role'] == 'master'
    assert sorted(patiently(medium.uids)) == sorted([gone, other])
    if how == 'hung':
        node.go_on()
        eventually(lambda: node.info('replication')['role'] == 'slave', 'that it follows')
    manager = medium.manager(EACH, gone)
    for event in ('before', 'after'):
        assert patiently(partial(manager.fire, 'a', event_id=event)).duplicate
    assert patiently(lambda: fired(manager)) == ['a', 'a']


def test_a_node_counts_its_own_replicas(own_cluster: Cluster):
    medium = Medium(
        'redis', own_cluster.url, prefix='test',
        settings={'triggers_storage_options': {'wait_replicas': 1, 'wait_timeout': 0.05}},
    )
    with_one, *_ = uids_at(medium, own_cluster, own_cluster.nodes[0])
    without, *_ = uids_at(medium, own_cluster, own_cluster.nodes[1])
    # A replica is sent no commands before it has told its master that it has the rest.
    eventually(lambda: own_cluster.nodes[0].info('replication')['slave0']['offset'])
    assert medium.manager(EACH, with_one).fire('a').released == ['t_each#0']
    with pytest.raises(StorageUnavailable, match='did not confirm'):
        medium.manager(EACH, without).fire('a')
