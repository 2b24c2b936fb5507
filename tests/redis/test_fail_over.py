"""Fail-overs while two processes fire from several threads: what is lost, and what never is.

Each of these checks besides that no event id was applied twice, that nothing is there of
which an error said that it had not happened, and that everything goes on afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.parts.redis_servers import MASTER, Cluster, Sentinels, Server
from tests.parts.waiting import eventually
from tests.redis.storm import ACKNOWLEDGED, THREADS, Storm, medium_of, patiently
from tests.redis.support import EACH, uids_at

#: So many firings are under way at the same time.
AT_ONCE = 2 * THREADS


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    """A master and its replica, for one test."""
    with Sentinels(1) as found:
        yield found


def hold_writes(master: Server, replica: Server) -> None:
    """Let a master answer no writes, and wait until its replica has all of them."""
    master.client.execute_command('CLIENT PAUSE', 20_000, 'WRITE')
    eventually(
        lambda: replica.info('replication')['slave_repl_offset']
        == master.info('replication')['master_repl_offset']
    )


def follow(old: Server, new: Server) -> None:
    """Let a master that was killed come back as a replica."""
    old.start()
    eventually(old.answers)
    old.client.replicaof('127.0.0.1', new.port)


def drop_clients(server: Server) -> None:
    server.client.execute_command('CLIENT KILL', 'TYPE', 'normal')


def test_a_fail_over_that_holds_the_writes_loses_nothing(
    own_sentinels: Sentinels, tmp_path: Path
):
    old = own_sentinels.master
    with Storm(own_sentinels.url, tmp_path) as storm:
        hold_writes(old, own_sentinels.other)
        own_sentinels.sentinels[0].client.execute_command('SENTINEL FAILOVER', MASTER)
        own_sentinels.new_master(old)
        drop_clients(old)
        storm.wait_for(30)
        assert storm.end().lost == set()


def test_a_master_that_dies_takes_with_it_what_no_replica_has(
    sentinels: Sentinels, tmp_path: Path
):
    old = sentinels.master
    with Storm(sentinels.url, tmp_path) as storm:
        sentinels.cut('replica', old)
        storm.wait_for(30)
        old.kill()
        sentinels.new_master(old)
        storm.wait_for(30)
        report = storm.end()
    assert len(report.lost) >= 2 * 30
    medium = medium_of(sentinels.url, storm.prefix, {})
    # To fire once more is all that it takes, of what is there too.
    for event in report.of(ACKNOWLEDGED):
        manager = medium.manager(EACH, event.split()[0])
        fire = partial(manager.fire, 'a', {'event': event}, event_id=event)
        assert patiently(fire).duplicate is (event not in report.lost)


def test_what_a_replica_has_confirmed_outlives_its_master(
    sentinels: Sentinels, tmp_path: Path
):
    old = sentinels.master
    with Storm(sentinels.url, tmp_path, wait_replicas=1, wait_timeout=0.2) as storm:
        sentinels.cut('replica', old)
        # From here on nothing is acknowledged, though it happens.
        eventually(lambda: storm.unknown() >= AT_ONCE)
        old.kill()
        new = sentinels.new_master(old)
        follow(old, new)
        storm.wait_for(30)
        assert storm.end().lost == set()


def depose(sentinels: Sentinels, how: str = 'parted') -> tuple[Server, Server]:
    """Let the Sentinels make another one the master, and tell the old one nothing for now.

    Args:
        how: ``parted`` from their master, or ``asked`` to: they see to the old one some
            seconds later.
    """
    old = sentinels.master
    if how == 'parted':
        sentinels.cut('sentinel', old)
    else:
        sentinels.sentinels[0].client.execute_command('SENTINEL FAILOVER', MASTER)
    return old, sentinels.new_master(old)


@pytest.mark.parametrize('how', ['parted', 'asked'])
def test_a_deposed_master_loses_what_it_acknowledges(
    sentinels: Sentinels, tmp_path: Path, how: str
):
    with Storm(sentinels.url, tmp_path) as storm:
        old, new = depose(sentinels, how)
        # Who is connected to it notices nothing.
        storm.wait_for(30)
        assert old.info('replication')['role'] == new.info('replication')['role'] == 'master'
        drop_clients(old)
        eventually(lambda: storm.connected(new))
        storm.wait_for(30)
        assert len(storm.end().lost) >= 2 * 30


@pytest.mark.parametrize('how', ['parted', 'asked'])
def test_a_deposed_master_that_needs_a_replica_refuses(
    sentinels: Sentinels, tmp_path: Path, how: str
):
    sentinels.master.client.config_set('min-replicas-to-write', 1)
    with Storm(sentinels.url, tmp_path) as storm:
        _, new = depose(sentinels, how)
        # Its refusals let the processes ask who is the master now.
        eventually(lambda: storm.connected(new))
        storm.wait_for(30)
        # What was on its way to the replica when that went: hardly more than one a thread.
        assert len(storm.end().lost) <= 2 * AT_ONCE


def test_a_deposed_master_confirms_nothing(sentinels: Sentinels, tmp_path: Path):
    with Storm(sentinels.url, tmp_path, wait_replicas=1, wait_timeout=0.2) as storm:
        old, new = depose(sentinels)
        drop_clients(old)
        old.client.replicaof('127.0.0.1', new.port)
        storm.wait_for(30)
        assert storm.end().lost == set()


@pytest.mark.parametrize('how', ['asked', 'killed'])
def test_a_fail_over_in_a_cluster(own_cluster: Cluster, tmp_path: Path, how: str):
    node, replica = own_cluster.nodes[0], own_cluster.replicas[0]
    with Storm(own_cluster.url, tmp_path) as storm:
        medium = medium_of(own_cluster.url, storm.prefix, {})
        assert set(uids_at(medium, own_cluster, node)) & set(storm.sessions)
        if how == 'asked':
            replica.client.execute_command('CLUSTER FAILOVER')
        else:
            node.kill()
        eventually(lambda: replica.info('replication')['role'] == 'master')
        storm.wait_for(30)
        report = storm.end()
    # The node that is asked holds the writes until its replica has all of them.
    assert how == 'killed' or report.lost == set()
