"""Heartbeats: one delivery that cannot be seen to keeps no other from it."""

from __future__ import annotations

from typing import Any

import pytest

from celery_triggers.manager.delivery import Delivery
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium
from celery_triggers.worker.heart import Heart

TASKS = {'t_x': {'after': ['a'], 'run': 'x'}}


def test_one_that_cannot_be_written_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    medium = Medium('memory', 'memory://beats', 'memory')
    runs: list[Delivery] = []
    for number in range(11):
        manager = medium.manager(TASKS, f's:{number}')
        manager.fire('a')
        run = delivery(manager, 't_x#0')
        run.claim()
        runs.append(run)
    real = MemoryStorageBackend._write
    written: list[str] = []

    def write(self: Any, what: Any) -> Any:
        if self.uid == 's:5':
            raise ValueError('this one cannot be written')
        written.append(self.uid)
        return real(self, what)

    monkeypatch.setattr(MemoryStorageBackend, '_write', write)
    assert Heart(lambda: runs, lambda: 1.0).beat()
    assert set(written) == {f's:{number}' for number in range(11)} - {'s:5'}
