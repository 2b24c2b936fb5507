"""The settings that a decision follows, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ['Limits']


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step is told about the application's settings.

    Attributes:
        dispatch_grace: Within how many milliseconds a released instance should have been
            sent; what is to run later than that is not sent yet.
        max_deliveries: How many workers may be lost with one attempt before it fails.
        max_cascade: How many cascades in a row are allowed.
        gate_refresh: After how many milliseconds the state of a waiting gate's result is
            stored again, which would expire else; 0: never.
    """

    dispatch_grace: int = 30_000
    max_deliveries: int = 10
    max_cascade: int = 1000
    gate_refresh: int = 0
