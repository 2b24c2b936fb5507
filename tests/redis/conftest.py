from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_triggers.testing.media import Medium
from tests.media import named
from tests.parts import redis_servers


@pytest.fixture
def cluster() -> redis_servers.Cluster:
    """This run's cluster of three nodes."""
    return redis_servers.start_cluster()


@pytest.fixture
def cluster_medium(tmp_path: Path) -> Iterator[Medium]:
    """An empty medium in this run's cluster."""
    found = named('redis-cluster').open(tmp_path)
    yield found
    found.clear()


@pytest.fixture
def own_cluster() -> Iterator[redis_servers.Cluster]:
    """A cluster for one test, whose first node has a replica."""
    with redis_servers.Cluster(replicas=1) as found:
        yield found


@pytest.fixture
def own_sentinels() -> Iterator[redis_servers.Sentinels]:
    """A master, its replica and three Sentinels for one test."""
    with redis_servers.Sentinels() as found:
        yield found


@pytest.fixture
def sentinel_medium() -> Iterator[Medium]:
    """An empty medium at the master that this run's Sentinels watch."""
    sentinels: Any = redis_servers.start_sentinels()
    yield Medium('redis', sentinels.url, prefix='test-sentinel')
    sentinels.master.client.flushall()
