"""A slice of a session as managers see it, with what is needed to commit a step on it."""

from __future__ import annotations

from dataclasses import dataclass

from celery_triggers.engine.session import Session
from celery_triggers.storages.records import Slice

__all__ = ['Snapshot']


@dataclass(slots=True)
class Snapshot:
    """A slice of a session with what is needed to commit a step on it.

    Attributes:
        exists: Whether the session was there.
    """

    session: Session
    slice: Slice
    passing: str

    @property
    def exists(self) -> bool:
        return bool(self.slice.version)

    @property
    def now(self) -> int:
        return self.slice.now
