"""How tests wait: for a condition, never for a time."""

from __future__ import annotations

from celery_triggers.testing.conformance.support import eventually

__all__ = ['eventually']
