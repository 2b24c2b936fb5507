"""What becomes of an instance whose task put a canvas in its own place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_triggers.delivery import exception_facts

__all__ = ['replacement_failed_in']


def replacement_failed_in(triggers: Any) -> Callable[..., Any]:
    """Return the error callback of a canvas that took the place of a trigger task.

    Args:
        triggers: ``app.triggers``.
    """

    def replacement_failed(self: Any, task_id: str, header: dict[str, Any]) -> None:
        result = triggers.app.AsyncResult(task_id)
        try:
            # The callbacks of a chord are sent before the chord's failure is stored.
            stored = result.ready()
            exc = result.result if stored and isinstance(result.result, BaseException) else None
        except NotImplementedError:
            # No result backend: the failure is known, if not its reason.
            stored, exc = True, None
        if not stored and self.request.retries < 5:
            raise self.retry(countdown=0.2)
        delivery = triggers.delivery(header, header.get('claim', ''))
        delivery.fail('raised', exception_facts(exc))

    return replacement_failed
