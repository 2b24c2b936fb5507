"""The answer to a firing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery_triggers.change import Outcome
from celery_triggers.storages.view import moment

__all__ = ['Firing', 'firing_of']


@dataclass(frozen=True, slots=True)
class Firing:
    """What came of a firing.

    Attributes:
        event_id: The application's id, or one that was made up.
        at: When it was applied, by the storage's clock (UTC).
        heard_by: The trigger tasks that it concerned.
        created, released, abandoned: Names of instances, its consequences included.
        duplicate: Whether an earlier firing with this event id had been applied; the
            other fields then tell what that one did.
        pending: Whether it is still to be applied.
    """

    uid: str
    trigger: str
    kwargs: dict[str, Any]
    event_id: str
    at: datetime
    heard_by: list[str]
    created: list[str]
    released: list[str]
    abandoned: list[str]
    duplicate: bool = False
    pending: bool = False
    due: datetime | None = None


def firing_of(
    uid: str, trigger: str, kwargs: dict[str, Any], outcome: Outcome[Any]
) -> Firing:
    """Return the answer to a firing whose change had this outcome."""
    record = outcome.record
    return Firing(
        uid,
        trigger,
        kwargs,
        outcome.event_id,
        moment(record.at),
        record.heard_by,
        record.created,
        record.released,
        record.abandoned,
        outcome.duplicate,
    )
