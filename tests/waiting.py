"""How tests wait: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar('T')


def eventually(condition: Callable[[], T], what: str = '', timeout: float = 30.0) -> T:
    """Ask until the answer is true, and return it.

    Raises:
        AssertionError: It was not within so many seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.01
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(
                f'not within {timeout} seconds: {what or condition}; last: {answer!r}'
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
