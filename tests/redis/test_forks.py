"""Processes that fork while threads talk to a cluster or to Sentinels."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.conformance.test_forks import in_child
from celery_triggers.testing.media import Medium
from tests.conformance.test_forks import THREADS, run
from tests.media import named
from tests.redis.support import EACH, client_of

MEDIA = ['cluster_medium', 'sentinel_medium', 'lone_medium']


@pytest.fixture
def lone_medium(tmp_path: Path) -> Iterator[Medium]:
    found = named('redis').open(tmp_path)
    yield found
    found.clear()


def pools_of(medium: Medium) -> list[Any]:
    """Return the pools of connections that a medium has in this process."""
    shared = client_of(medium)
    clients = list(shared._clients.values()) if hasattr(shared, '_clients') else [shared.client]
    pools = [client.connection_pool for client in clients]
    for pool in list(pools):
        sentinel = getattr(pool, 'sentinel_manager', None)
        pools += [one.connection_pool for one in sentinel.sentinels] if sentinel else []
    return pools


@pytest.mark.parametrize('name', MEDIA)
def test_no_lock_of_a_pool_is_inherited(name: str, request: pytest.FixtureRequest):
    medium: Medium = request.getfixturevalue(name)
    manager = medium.manager(EACH)
    manager.fire('a')
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for pool in pools_of(medium):
                stack.enter_context(pool._lock)
                stack.enter_context(pool._fork_lock)
            held.set()
            leave.wait()

    def fire() -> None:
        # Whoever waits for such a lock does so for ever.
        signal.alarm(10)
        manager.fire('a')
        gc.collect()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(fire) == 0
    finally:
        leave.set()
        thread.join()
    assert len(statuses(manager)) == 2


@pytest.mark.parametrize('name', MEDIA[:2])
def test_a_child_of_a_process_whose_threads_fire_can_fire(
    name: str, request: pytest.FixtureRequest
):
    medium: Medium = request.getfixturevalue(name)
    codes, here, all_ = run(THREADS, medium.key, str(medium.url), medium.prefix).split(';')
    assert codes == str([0] * 10)
    assert int(all_) == int(here) + 10


@pytest.mark.parametrize('name', MEDIA[:2])
def test_a_manager_is_of_use_in_a_child_and_still_in_its_parent(
    name: str, request: pytest.FixtureRequest
):
    medium: Medium = request.getfixturevalue(name)
    manager = medium.manager(EACH)
    manager.fire('a')
    for number in range(3):
        assert in_child(lambda: [manager.fire('a') for _ in range(3)]) == 0
        manager.fire('a', {'n': number})
    assert len(statuses(manager)) == 13
