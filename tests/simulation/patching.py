"""Lets the product run in a simulated world: its clocks, pauses and made-up names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery_triggers.canvas import own_tasks
from celery_triggers.manager import change, delivery, patience, pending
from celery_triggers.runners import broker_thread as publisher
from celery_triggers.storages import base as storage_base
from celery_triggers.storages import memory as memory_storage
from tests.simulation.world import World


class _Time:
    """Stands for the module ``time`` in the product while a world runs."""

    def __init__(self, world: World):
        self.sleep = world.sleep
        self.monotonic = lambda: world.now / 1000
        self.time = lambda: world.now / 1000


class _Random:
    """Stands for ``random``: pauses are as long as they can be, or nothing."""

    def __init__(self, world: World):
        self.uniform = lambda low, high: world.pick(high, low)


class _Secrets:
    """Stands for ``secrets``: names that tell the order in which they were made."""

    def __init__(self, world: World):
        self.token_hex = lambda _=0: world.serial('x')


@contextmanager
def patched(world: World) -> Iterator[None]:
    """Let the product run in a world: its clock, its sleep, its random names."""
    fake_time = _Time(world)
    changes: list[tuple[Any, str, Any]] = [
        (change, 'time', fake_time),
        (change, 'random', _Random(world)),
        (change, 'secrets', _Secrets(world)),
        (pending, 'secrets', _Secrets(world)),
        (change, 'new_task_id', lambda: world.serial('id-')),
        (storage_base, 'secrets', _Secrets(world)),
        (memory_storage, 'host_time', lambda: world.storage_time),
        (delivery, 'time', fake_time),
        (patience, 'time', fake_time),
        (own_tasks, 'time', fake_time),
        (publisher, 'time', fake_time),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        logging.disable(disabled)
        for owner, name, value in before:
            setattr(owner, name, value)
