"""What each operation asks of a cache; each call is a round trip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from celery_triggers.storages.cache.server import CacheServer
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium
from tests.documents.test_costs import TASKS

LOAD = ['get_many', 'get_many']
#: The next version, whether it is that, the pointer, the mark.
SAVE = ['add', 'get_many', 'set', 'set_many']


@contextmanager
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    real: Any = CacheServer._call
    found: list[str] = []

    def call(self: CacheServer, method: str, *args: Any) -> Any:
        found.append(method)
        return real(self, method, *args)

    with monkeypatch.context() as patched:
        patched.setattr(CacheServer, '_call', call)
        # Where a test is held up the pointer is looked at once more.
        patched.setattr('celery_triggers.storages.cache.versions.SLOW', 60)
        yield found


def test_a_firing_is_six_round_trips(local_medium: Medium, monkeypatch: pytest.MonkeyPatch):
    manager = local_medium.manager(TASKS)
    for _ in range(3):
        manager.fire('a')
    with calls(monkeypatch) as found:
        manager.fire('a')
    assert found == [*LOAD, *SAVE]
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    with calls(monkeypatch) as found:
        run.claim()
    assert found == [*LOAD, *SAVE]


def test_a_sweep_that_finds_nothing_due_writes_nothing(
    local_medium: Medium, monkeypatch: pytest.MonkeyPatch
):
    manager = local_medium.manager(TASKS)
    manager.fire('a')
    manager.fire('b')

    def take() -> Any:
        settings = manager.storage.settings
        kind = local_medium.storage_class
        return kind.take_due(local_medium.url, settings, limit=9, push=30_000, gap=30_000)

    take()
    # Other caches of Django's are asked whether they hold any session.
    monkeypatch.setattr(type(manager.storage), '_others', lambda _: iter(()))
    with calls(monkeypatch) as found:
        assert take().next_at is not None
    assert found == [*LOAD, *LOAD], 'when somebody last looked, and sixteen parts of the index'
