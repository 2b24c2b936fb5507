"""The user of the documentation: may do all that the storage needs, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.firing import fire_all
from celery_triggers.storages.redis import RedisStorageBackend
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.conformance.test_fire_many import into
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Cluster, Group, Sentinels, Server
from tests.redis.support import UIDS

PAGE = (Path(__file__).parents[2] / 'docs' / 'running' / 'redis.md').read_text()

LINE = re.findall(r'^    (ACL SETUSER .+)$', PAGE, re.MULTILINE)[0]

#: What the page adds to it, and for what.
MORE = dict(re.findall(r'^- for (.+): `(\+.+)`$', PAGE, re.MULTILINE))

TASKS: dict[str, Any] = {
    't_each': {'andEvery': 'a', 'run': 'x'},
    't_then': {'after': ['b'], 'unless': ['t_never'], 'within': 3600, 'run': 'x'},
}


class Lone(Group):
    def _start(self) -> None:
        self.server = self.add()


@pytest.fixture(scope='module')
def lone() -> Iterator[Server]:
    with Lone() as group:
        yield group.server


def allow(server: Server, *more: str) -> None:
    server.client.execute_command('ACL DELUSER', 'triggers')
    server.client.execute_command(*LINE.split(), *(word for add in more for word in add.split()))
    server.client.execute_command('CONFIG RESETSTAT')
    server.client.acl_log_reset()


def medium_at(server: Server, database: int = 0, **options: Any) -> Medium:
    return Medium(
        'redis', f'redis://triggers:password@127.0.0.1:{server.port}/{database}',
        prefix='triggers', settings={'triggers_storage_options': options},
    )


def do_everything(medium: Medium) -> None:
    application = medium.application(TASKS, triggers_session_expires=3600)
    place = medium.url, application.settings
    fire_all(into(medium, application, *UIDS[:50]))
    manager = medium.manager(application)
    manager.fire('a', event_id='e', countdown=60)
    manager.fire('b')
    manager.update_configuration({'t_own': {'after': ['c'], 'run': 'x'}})
    manager.fire('c')
    application.configuration = type(application.configuration).parse({})
    run = delivery(manager, 't_then#0')
    assert run.claim()
    assert run.finish({'n': 1})
    assert statuses(manager)['t_then#0'] == 'finished'
    storage: Any = manager.storage
    assert storage._configuration(storage.load().head.digest) is not None
    assert RedisStorageBackend.gates(*place, ['nobody']) == {}
    assert list(RedisStorageBackend.due_dates(*place))
    RedisStorageBackend.take_due(*place, limit=640, push=1000, gap=1)
    assert len(medium.uids()) >= 50
    for uid in medium.uids():
        assert medium.manager(application, uid).storage.delete()


def denied(server: Server) -> list[Any]:
    # redis-py says its name where a server is new enough to be told, and minds no refusal.
    return [entry for entry in server.client.acl_log() if entry['object'] != 'client|setinfo']


def used(server: Server) -> set[str]:
    found = {name.removeprefix('cmdstat_') for name in server.info('commandstats')}
    # Logging in needs no permission; the rest is the test's own.
    return {
        name for name in found
        if name not in ('hello', 'auth', 'info', 'ping') and not name.startswith(
            ('acl|', 'config|', 'client|')
        )
    }


def test_the_line_suffices_and_names_nothing_that_is_not_needed(lone: Server):
    allow(lone)
    do_everything(medium_at(lone))
    assert denied(lone) == []
    assert used(lone) == set(re.findall(r'\+(\S+)', LINE))


def test_another_database(lone: Server):
    allow(lone)
    with pytest.raises(StorageUnavailable, match="'select'"):
        medium_at(lone, 1).manager(TASKS).fire('a')
    allow(lone, MORE['a database other than 0'])
    do_everything(medium_at(lone, 1))
    assert denied(lone) == []


def test_connections_that_are_checked(lone: Server):
    allow(lone, MORE['`health_check_interval`'])
    do_everything(medium_at(lone, health_check_interval=1))
    assert denied(lone) == []


def test_a_cluster():
    with Cluster(nodes=1) as cluster:
        node = cluster.nodes[0]
        allow(node, MORE['a cluster'])
        url = cluster.url.replace('://', '://triggers:password@')
        do_everything(Medium('redis', url, prefix='triggers'))
        assert denied(node) == []
        allow(node)
        with pytest.raises(StorageUnavailable, match=r'cluster\|slots'):
            Medium('redis', f'{url}?socket_timeout=9', prefix='triggers').manager({}).fire('a')


def test_sentinels_and_replicas_that_confirm():
    sentinel_user = re.search(r'A user of the Sentinels needs `(.+?)`', PAGE)
    assert sentinel_user is not None
    with Sentinels(1) as sentinels:
        for server in sentinels.data:
            allow(server, MORE['`wait_replicas`'])
        sentinels.sentinels[0].client.execute_command(
            'ACL SETUSER', 'asker', 'on', '>x', 'resetchannels', 'nocommands', sentinel_user[1]
        )
        options = {
            'wait_replicas': 1, 'sentinel_username': 'asker', 'sentinel_password': 'x',
        }
        url = sentinels.url.replace(':default@', 'triggers:password@')
        do_everything(
            Medium(
                'redis', url, prefix='triggers', settings={'triggers_storage_options': options}
            )
        )
        assert denied(sentinels.master) == denied(sentinels.sentinels[0]) == []


def test_keys_outside_the_prefix_are_refused(lone: Server):
    allow(lone)
    lone.client.set('other', 'secret')
    with lone.new_client(username='triggers', password='password') as client:
        for command in (['GET', 'other'], ['SET', 'triggersx', '1'], ['DEL', 'other']):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        with pytest.raises(redis.exceptions.ResponseError, match='access|ermission'):
            client.eval("return redis.call('GET', 'other')", 0)
        for command in (['FLUSHALL'], ['KEYS', '*'], ['CONFIG', 'GET', '*'], ['SUBSCRIBE', 'x']):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    theirs = Medium('redis', medium_at(lone).url, prefix='triggersx')
    with pytest.raises(StorageUnavailable, match='refused.*ermission') as caught:
        theirs.manager(TASKS).fire('a')
    assert not caught.value.outcome_unknown


def test_without_scan_only_listing_fails(lone: Server):
    allow(lone, '-scan')
    medium = medium_at(lone)
    medium.manager(TASKS).fire('a')
    with pytest.raises(StorageUnavailable, match="'scan'"):
        medium.uids()
