"""What the tests of clusters and Sentinels share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from redis.connection import AbstractConnection
from redis.crc import key_slot

from celery_triggers.storages.redis.cluster import servers
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Cluster, Server

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}

#: More than there are shards.
UIDS = [f'order:{number}' for number in range(200)]


def client_of(medium: Medium) -> Any:
    """Return what the storages of a medium share in this process."""
    settings = medium.application().settings
    return servers.get(str(medium.url), options=settings.storage_options)


def base_of(medium: Medium, uid: str = 'order:1') -> str:
    """Return how the keys of a session's shard begin."""
    storage: Any = medium.backend(uid)
    base: str = storage._base
    return base


def slot_of(medium: Medium, uid: str = 'order:1') -> int:
    slot: int = key_slot(f'{base_of(medium, uid)}:d'.encode())
    return slot


def uids_at(medium: Medium, cluster: Cluster, node: Server) -> list[str]:
    """Return uids whose sessions are, or would be, at a node of a cluster."""
    return [uid for uid in UIDS if cluster.owner(slot_of(medium, uid)) is node]


@dataclass
class Traffic:
    """What was sent: for each write to a connection its port and its commands' names."""

    writes: list[tuple[int, list[str]]] = field(default_factory=list)

    @property
    def names(self) -> list[list[str]]:
        return [names for _, names in self.writes]

    def by_port(self) -> dict[int, list[list[str]]]:
        found: dict[int, list[list[str]]] = {}
        for port, names in self.writes:
            found.setdefault(port, []).append(names)
        return found


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Note what this process writes to Redis; each write is a round trip."""
    found = Traffic()
    real = AbstractConnection.send_packed_command

    def noting(connection: Any, command: Any, *args: Any, **options: Any) -> Any:
        packed = command if isinstance(command, (list, tuple)) else [command]
        text = b''.join(part if isinstance(part, bytes) else part.encode() for part in packed)
        names = re.findall(rb'(?:^|\r\n)\*\d+\r\n\$\d+\r\n([A-Z]+)(?=\r\n)', text)
        # A connection that is new says who it is, once.
        if names[0] not in (b'HELLO', b'AUTH', b'CLIENT', b'SELECT'):
            found.writes.append((connection.port, [name.decode() for name in names]))
        return real(connection, command, *args, **options)

    with mock.patch.object(AbstractConnection, 'send_packed_command', noting):
        yield found
