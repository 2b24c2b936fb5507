"""A server that is full still lets go of sessions, and its sweeps still take what is due."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.redis import RedisStorageBackend
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Group, Server

TASKS: dict[str, Any] = {'t_then': {'after': ['a'], 'within': 3600, 'run': 'x'}}


class Lone(Group):
    def _start(self) -> None:
        self.server = self.add('maxmemory-policy noeviction')


@pytest.fixture
def lone() -> Iterator[Server]:
    with Lone() as group:
        yield group.server


def medium_with_a_session(server: Server) -> Medium:
    medium = Medium('redis', f'redis://127.0.0.1:{server.port}/0', prefix='triggers')
    medium.manager(TASKS).fire('a', event_id='e')
    server.client.config_set('maxmemory', 1)
    with pytest.raises(StorageUnavailable):
        medium.manager(TASKS, 'another').fire('a')
    return medium


def test_a_full_server_can_be_emptied(lone: Server):
    medium = medium_with_a_session(lone)
    assert medium.uids()
    for uid in medium.uids():
        assert medium.manager(TASKS, uid).storage.delete()
    assert not medium.uids()


def test_a_full_server_can_be_swept(lone: Server):
    medium = medium_with_a_session(lone)
    key = next(iter(lone.client.scan_iter('triggers:*:d')))
    lone.client.config_set('maxmemory', 0)
    member = lone.client.zrange(key, 0, 0)[0]
    lone.client.zadd(key, {member: 1})
    lone.client.config_set('maxmemory', 1)
    settings = medium.application(TASKS).settings
    taken = RedisStorageBackend.take_due(medium.url, settings, limit=640, push=1000, gap=1)
    assert len(taken.entries) == 1
    # It was moved, so that the next sweep does not take it at once.
    assert lone.client.zscore(key, member) > 1
