"""A change that must not be lost is made again and again while the storage is down."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TypeVar

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.change import Change, Outcome

__all__ = ['make_patiently']

logger = logging.getLogger(__name__)

T = TypeVar('T')

#: Pauses between attempts while the storage is down (seconds).
FIRST_PAUSE = 0.25
MOST_PAUSE = 5.0


def make_patiently(
    change: Change[T], patience: float, unmoved_by: tuple[type[Exception], ...], what: str
) -> Outcome[T]:
    """Make a change; while the storage is down, again and again for some time.

    Args:
        patience: For how many seconds.
        unmoved_by: Exceptions that may strike at any time and must not stop it.
        what: What is being stored, for the log.

    Raises:
        StorageUnavailable: It was down for all of that time.
    """
    deadline = time.monotonic() + patience
    pause = FIRST_PAUSE
    while True:
        try:
            return change.make()
        except StorageUnavailable as exc:
            if time.monotonic() + pause > deadline:
                raise
            if pause == FIRST_PAUSE:
                logger.warning('%s cannot be stored yet: %s', what, exc)
        except unmoved_by:
            # The same change again: it finds out whether it was committed.
            continue
        with suppress(*unmoved_by):
            time.sleep(pause)
        pause = min(pause * 2, MOST_PAUSE)
