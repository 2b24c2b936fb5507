"""The worker's side of a message: each delivery gets a token before it goes to a child."""

from __future__ import annotations

import secrets
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import WorkerLostError
from celery.worker.request import Request

from celery_triggers.manager.header import is_header
from celery_triggers.worker.held import hold, keep, submit_give_back, submit_loss

__all__ = ['TriggerRequest']


class TriggerRequest(Request):
    """A request whose claim token the worker's parent and its child both know.

    So the parent can renew the lease of the very claim that the child holds, and report
    the child's loss.
    """

    def __init__(self, message: Any, *args: Any, **kwargs: Any):
        super().__init__(message, *args, **kwargs)
        request: dict[str, Any] = self.request_dict
        header: Any = request.get('triggers')
        if is_header(header):
            token = request['triggers_token'] = secrets.token_hex(8)
            hold(self, token)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Report a lost child also where Celery sends no signal for it."""
        token = self.request_dict.get('triggers_token')
        if token and self._already_cancelled:  # type: ignore[attr-defined]
            submit_give_back(self.app, self, token)
        elif token and self._is_loss(_exception(exc_info)):
            # Through the queue: whether the message comes back or was acknowledged, its
            # claim is ended and the instance sent again, and one of the two is refused.
            task: Any = self.task
            # What Celery gives back to the broker it tells nobody of.
            returned = bool(task.acks_late and task.reject_on_worker_lost)
            submit_loss(task, self, str(_exception(exc_info)), untold=returned)
        return super().on_failure(exc_info, *args, **kwargs)

    def cancel(self, *args: Any, **kwargs: Any) -> Any:
        """Remember a request whose process is told to end, until it has."""
        token = self.request_dict.get('triggers_token')
        if token:
            keep(self, token)
        return super().cancel(*args, **kwargs)

    def _is_loss(self, exception: BaseException) -> bool:
        if isinstance(exception, (SystemExit, KeyboardInterrupt)):
            # Celery kills the child of a task that is revoked.
            return not self._already_revoked  # type: ignore[attr-defined]
        return isinstance(exception, WorkerLostError)

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
