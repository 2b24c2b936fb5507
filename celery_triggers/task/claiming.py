"""How a task asks for the right to run, also while the storage is down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from kombu.exceptions import OperationalError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.delivery import Delivery, uptime
from celery_triggers.task.endings import ClaimRefused

__all__ = ['ask', 'lease_seconds']

logger = logging.getLogger(__name__)

#: For how many seconds a claim is tried that meets no storage, and after how many more its
#: message comes again.
CLAIM_PATIENCE = 10.0
CLAIM_AGAIN = 5.0


def ask(task: Any, delivery: Delivery, question: Callable[[], bool]) -> None:
    """Ask for the right to run; while the storage is down, again and again for some time.

    Raises:
        ClaimRefused: This delivery is not to run the code.
    """
    deadline = uptime() + min(CLAIM_PATIENCE, lease_seconds(delivery) / 2)
    while True:
        try:
            if question():
                return
            break
        except StorageUnavailable as exc:
            if uptime() > deadline or task.request.is_eager:
                _come_again(task, delivery, exc)
        time.sleep(0.25)
    raise ClaimRefused(f'{delivery.name} is not to be run by this delivery')


def _come_again(task: Any, delivery: Delivery, exc: StorageUnavailable) -> None:
    logger.warning(
        '%s of session %r cannot be claimed yet, its message comes again in %g '
        'seconds: %s', delivery.name, delivery.header['uid'], CLAIM_AGAIN, exc,
    )
    try:
        # Rejecting does nothing for a message that was acknowledged early, so it is
        # published again, the same but later.
        task.same_message(countdown=CLAIM_AGAIN).apply_async(retry=False)
    except (OperationalError, OSError):
        logger.warning(
            '%s of session %r is sent again when its due date comes: the broker is down too',
            delivery.name, delivery.header['uid'],
        )
    raise ClaimRefused(f'the storage is down; the message comes again: {exc}') from exc


def lease_seconds(delivery: Delivery) -> float:
    """Return for how many seconds a claim holds that is not renewed."""
    return float(delivery.manager.storage.settings.lease)
