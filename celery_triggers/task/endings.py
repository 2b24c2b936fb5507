"""How a run ends that neither returns nor fails: exceptions that Celery lets pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.exceptions import Ignore

__all__ = ['ClaimRefused', 'Replaced', 'Replayed', 'Skipped']


class ClaimRefused(Ignore):
    """A delivery may not run its attempt; the message is acknowledged, nothing happens."""


class Replaced(Ignore):
    """A task replaced itself; the replacement carries its claim."""


class Skipped(Ignore):
    """Raised by ``self.skip(...)``; the worker resolves the instance as skipped."""

    def __init__(self, metadata: Mapping[str, Any] | None = None):
        super().__init__('skipped')
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> Any:
        # Celery pickles it for the worker's parent, which must not stumble over metadata.
        return Ignore, self.args


class Replayed(Ignore):
    """Raised by ``self.replay(...)``; the worker releases a new instance."""

    def __init__(
        self,
        replacement_kwargs: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
        countdown: float,
    ):
        super().__init__('replayed')
        self.replacement_kwargs = dict(replacement_kwargs or {})
        self.metadata = dict(metadata or {})
        self.countdown = countdown

    def __reduce__(self) -> Any:
        return Ignore, self.args
