"""Locks and pauses that survive ``os.fork()``: prefork workers fork at any moment.

A lock that another thread holds while a process forks stays held in the child for ever,
since that thread does not exist there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ['ForkGate', 'ForkLock', 'reset_in_child']


class ForkLock:
    """A reentrant lock that a forked child gets new."""

    _all: weakref.WeakSet[ForkLock] = weakref.WeakSet()

    def __init__(self) -> None:
        self._renew()
        self._all.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @classmethod
    def renew_all(cls) -> None:
        """Renew every lock; called in a forked child."""
        for lock in cls._all:
            lock._renew()


_to_reset: weakref.WeakSet[Any] = weakref.WeakSet()


def reset_in_child(owner: Any) -> None:
    """Call ``owner._reset()`` in each forked child, for as long as it exists."""
    _to_reset.add(owner)


def _reset_all() -> None:
    for owner in list(_to_reset):
        owner._reset()


class ForkGate:
    """Lets this process fork only while no thread is inside, or after some patience.

    A thread must not be inside twice.

    Args:
        patience: For how many seconds a fork waits at most.
        when_closed: Is called before the fork, when nobody is inside.
        outer: Whether threads enter other gates while they are inside this one.
    """

    _all: weakref.WeakSet[ForkGate] = weakref.WeakSet()
    _closed: list[ForkGate] = []
    _forking = threading.Lock()

    def __init__(
        self,
        patience: float,
        when_closed: Callable[[], None] | None = None,
        *,
        outer: bool = False,
    ):
        self.patience = patience
        self._when_closed = when_closed
        self._outer = outer
        self._renew()
        self._all.add(self)

    def _renew(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._closing = False

    def __enter__(self) -> None:
        with self._condition:
            while self._closing:
                self._condition.wait()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def _close(self) -> None:
        self._condition.acquire()
        self._closing = True
        self._condition.wait_for(lambda: not self._inside, self.patience)
        if self._when_closed is not None:
            self._when_closed()

    def _open(self) -> None:
        self._closing = False
        self._condition.notify_all()
        self._condition.release()

    @classmethod
    def close_all(cls) -> None:
        """Let nobody in, and wait until nobody is inside; called before a fork."""
        cls._forking.acquire()
        # The outer ones first, while those inside can still get through the others.
        cls._closed = sorted(cls._all, key=lambda gate: not gate._outer)
        for gate in cls._closed:
            gate._close()

    @classmethod
    def open_all(cls) -> None:
        """Let threads in again; called in the parent after a fork."""
        for gate in cls._closed:
            gate._open()
        cls._closed = []
        cls._forking.release()

    @classmethod
    def renew_all(cls) -> None:
        """Renew every gate; called in a forked child."""
        cls._forking = threading.Lock()
        cls._closed = []
        for gate in cls._all:
            gate._renew()


os.register_at_fork(
    before=ForkGate.close_all,
    after_in_parent=ForkGate.open_all,
    after_in_child=ForkGate.renew_all,
)
os.register_at_fork(after_in_child=ForkLock.renew_all)
os.register_at_fork(after_in_child=_reset_all)
