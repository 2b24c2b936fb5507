"""The worker's side of a message: each delivery gets a token before it goes to a child."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import WorkerLostError
from celery.worker.request import Request

from celery_triggers.delivery import is_header
from celery_triggers.exceptions import TriggersError

__all__ = ['TriggerRequest']

logger = logging.getLogger(__name__)


class TriggerRequest(Request):
    """A request whose claim token the worker's parent and its child both know.

    So the parent can report the loss of a child for the very claim that the child held.
    """

    def __init__(self, message: Any, *args: Any, **kwargs: Any):
        super().__init__(message, *args, **kwargs)
        request: dict[str, Any] = self.request_dict
        header: Any = request.get('triggers')
        if is_header(header):
            request['triggers_token'] = header.get('claim') or secrets.token_hex(8)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """End the claim of a lost child before Celery gives its message back."""
        header: Any = self.request_dict.get('triggers')
        task: Any = self.task
        if (
            is_header(header)
            and task.acks_late
            and task.reject_on_worker_lost
            and isinstance(_exception(exc_info), WorkerLostError)
        ):
            # Here and now, not through the queue: the message may be back in a moment,
            # and its claim would meet this one.
            try:
                task.app.triggers.delivery(header, self.request_dict['triggers_token']).requeue()
            except TriggersError:
                logger.exception('the claim of %s outlives its process', header['instance'])
        return super().on_failure(exc_info, *args, **kwargs)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Report a time limit with the request at hand: Celery sends its signal without."""
        self.task.request_stack.push(self._context)  # type: ignore[attr-defined]
        try:
            super().on_timeout(soft, timeout)
        finally:
            self.task.request_stack.pop()


def _exception(exc_info: Any) -> Any:
    exception = exc_info.exception
    return exception.exc if isinstance(exception, ExceptionWithTraceback) else exception
