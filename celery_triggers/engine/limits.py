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
        chord_patience: For how many milliseconds Celery's own claim to hand the body of a chord
            on may outlast the worker that has it.
        gate_refresh: After how many milliseconds the state of a waiting gate's result is
            stored again, which would expire else; 0: never.
    """

    dispatch_grace: int = 30_000
    max_deliveries: int = 10
    max_cascade: int = 1000
    chord_patience: int = 60_000
    gate_refresh: int = 0
