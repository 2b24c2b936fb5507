"""The Celery tasks that this package brings along, one of each for every application.

``celery_triggers.fire``
    Fires a trigger; in a chain with the previous result.
``celery_triggers.run``
    Puts a canvas in its own place: the form in which a canvas is sent.
``celery_triggers.end``
    Ends the result of a gate that will not run.
``celery_triggers.replacement_finished``, ``celery_triggers.replacement_failed``
    Tell how what took the place of a trigger task has ended, where its own code cannot.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from celery import states
from celery.app.task import Context
from celery.canvas import Signature, _chain, chunks, group, maybe_signature
from celery.canvas import chord as _chord
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from celery_triggers.engine.calls import END, FIRE, RUN
from celery_triggers.engine.step import cascade_kwargs
from celery_triggers.exceptions import (
    GateAbandoned,
    GateEnded,
    GateExpired,
    InvalidFiring,
    StorageUnavailable,
)
from celery_triggers.manager.facts import exception_facts
from celery_triggers.manager.gate_life import GateEnd
from celery_triggers.task import TriggerTask

__all__ = ['add_own_tasks']

logger = logging.getLogger(__name__)

#: For how many seconds the news that a gate's end was told is offered to the storage.
PATIENCE = 10.0

#: A storage, a broker or a result backend that is down: what was to be done must not be lost.
_DOWN = (OperationalError, OSError, StorageUnavailable)


def add_own_tasks(services: Any) -> None:
    """Register them with an application.

    Args:
        services: Of the application.
    """
    durable: dict[str, Any] = {
        'bind': True,
        'shared': False,
        'acks_late': True,
        'reject_on_worker_lost': True,
        'autoretry_for': _DOWN,
        'retry_backoff': True,
        'max_retries': None,
    }
    app = services.app
    app.task(name=FIRE, **durable)(_fire_with(services))
    app.task(name=END, ignore_result=True, **durable)(_end_with(services))
    app.task(name=RUN, bind=True, shared=False, base=TriggerTask)(_run)
    app.task(name='celery_triggers.replacement_failed', **durable)(_replacement_failed(services))
    app.task(name='celery_triggers.replacement_finished', **durable)(
        _replacement_finished(services)
    )


# ----------------------------------------------------------------------- fire


def _fire_with(services: Any) -> Any:
    def fire(
        self: Any,
        *args: Any,
        uid: str | None = None,
        trigger_name: str | None = None,
        trigger_kwargs: Mapping[str, Any] | None = None,
        event_id: str | None = None,
    ) -> dict[str, Any]:
        """Fire a trigger: ``(uid, trigger_name[, trigger_kwargs])``.

        In a chain the previous result joins the kwargs: a mapping as it is, ``None`` as
        nothing, anything else as ``{"result": value}``. The event id is made of the task id,
        so that a message which comes twice fires once.

        Returns:
            The kwargs that were fired.
        """
        previous, uid, trigger_name, given = _spoken(args, uid, trigger_name, trigger_kwargs)
        kwargs = {**given, **cascade_kwargs(previous)}
        services.session(uid).fire(
            trigger_name, kwargs, event_id=event_id or f'{FIRE}:{self.request.id}'
        )
        return kwargs

    return fire


def _spoken(
    args: tuple[Any, ...], uid: Any, trigger_name: Any, trigger_kwargs: Any
) -> tuple[Any, Any, Any, Mapping[str, Any]]:
    """Return the previous result, the uid, the trigger's name and its kwargs.

    Raises:
        InvalidFiring: The arguments are others than these.
    """
    named = uid is not None or trigger_name is not None
    if named and len(args) <= 1:
        return (args[0] if args else None), uid, trigger_name, trigger_kwargs or {}
    if not named and 2 <= len(args) <= 3:
        return None, args[0], args[1], (args[2] if len(args) == 3 else trigger_kwargs) or {}
    raise InvalidFiring(
        f'{FIRE} takes (uid, trigger_name[, trigger_kwargs]), or uid= and trigger_name= and '
        f'the previous result of a chain, not {args!r}',
        uid=uid, trigger=trigger_name,
    )


# ------------------------------------------------------------------------ run


def _run(self: Any, *args: Any, canvas: Mapping[str, Any], **kwargs: Any) -> Any:
    """Put a canvas in this task's place, with what came before it in a chain."""
    return self.replace(_given(canvas, args, kwargs, self.app))


_EMPTY: dict[str, Any] = {
    'args': (), 'kwargs': {}, 'options': {}, 'subtask_type': None, 'immutable': False,
}


def _given(canvas: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], app: Any) -> Any:
    """Return a canvas, as signatures throughout, whose first tasks are given arguments.

    They stand before their own. Arguments of a canvas itself would be lost where it is made
    part of another one.
    """
    if not isinstance(canvas, Signature):
        # A configuration may leave out what is empty.
        canvas = {**_EMPTY, **canvas}
    signature: Any = maybe_signature(canvas, app=app)
    if isinstance(signature, chunks):
        # By itself it has no result.
        signature = signature.group()
    if isinstance(signature, _chain):
        first, *rest = signature.tasks
        rest = [_given(task, (), {}, app) for task in rest]
        signature.kwargs['tasks'] = [_given(first, args, kwargs, app), *rest]
    elif isinstance(signature, group):
        tasks = [_given(task, args, kwargs, app) for task in signature.tasks]
        signature.kwargs['tasks'] = tasks
    elif isinstance(signature, _chord):
        header = getattr(signature.tasks, 'tasks', signature.tasks)
        members = [_given(task, args, kwargs, app) for task in header]
        signature.kwargs['header'] = group(members, app=app)
        signature.kwargs['body'] = _given(signature.body, (), {}, app)
    elif args or kwargs:
        return signature.clone(args, dict(kwargs))
    return signature


# ------------------------------------------------------------------------ end


def _end_with(services: Any) -> Any:
    def end(
        self: Any, header: Mapping[str, Any], end: Mapping[str, Any], request: Mapping[str, Any]
    ) -> None:
        """End the result of a gate, call its error callbacks and fail its chord.

        As Celery does it for a task that fails. It is done here, in a worker, since error
        callbacks run where that is done.

        Args:
            header: Of the gate's instance, see :func:`.header_of`.
            end: How it ended: ``{"status", "reason", "missing", "message", "result"}``.
            request: What its message would have had, see :class:`celery.app.task.Context`.
        """
        manager = services.session(
            str(header['uid']), str(header['manager']), str(header['storage'])
        )
        # More than the message's id: that may come twice.
        ending = GateEnd(manager, header, f'{self.request.id}:{secrets.token_hex(4)}')
        if not ending.claim():
            return
        context = Context({**request, 'delivery_info': {'is_eager': self.request.is_eager}})
        try:
            _tell(self.app.backend, context, header, end)
        except _DOWN:
            with suppress(StorageUnavailable):
                ending.give_up()
            raise
        _note_done(ending)

    return end


def _tell(
    backend: Any, context: Context, header: Mapping[str, Any], end: Mapping[str, Any]
) -> None:
    store = not context.ignore_result
    if end['status'] in ('finished', 'skipped'):
        backend.mark_as_done(context.id, end['result'], context, store_result=store)
        return
    backend.mark_as_failure(
        context.id,
        _exception(header, end),
        request=context,
        store_result=store,
        state=states.REVOKED if end['status'] == 'revoked' else states.FAILURE,
    )


def _exception(header: Mapping[str, Any], end: Mapping[str, Any]) -> Exception:
    uid, name, reason, missing = header['uid'], header['instance'], end['reason'], end['missing']
    text = f'{name} of session {uid!r} did not run: {reason}'
    if end.get('message'):
        text += f': {end["message"]}'
    if missing:
        text += f'; it had not received {", ".join(missing)}'
    if end['status'] == 'revoked':
        return TaskRevokedError(text)
    kind: type[GateEnded] = GateExpired if reason == 'deadline' else GateAbandoned
    return kind(text, uid, name, reason, missing)


def _note_done(ending: GateEnd) -> None:
    """Note that it was told; while the storage is down, again and again for some time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            ending.done()
            return
        except StorageUnavailable as exc:
            if time.monotonic() > deadline:
                logger.error(
                    'the end of %s of session %r is told once more, later: %s',
                    ending.header['instance'], ending.header['uid'], exc,
                )
                return
        time.sleep(0.25)


# --------------------------------------------------------------- replacements


def _replacement_finished(services: Any) -> Any:
    def replacement_finished(self: Any, result: Any, header: dict[str, Any]) -> None:
        """End a trigger task with the result of the gate that took its place."""
        services.delivery(header, header.get('claim', '')).finish(result)

    return replacement_finished


def _replacement_failed(services: Any) -> Any:
    def replacement_failed(self: Any, task_id: str, header: dict[str, Any]) -> None:
        """End a trigger task with the failure of what took its place."""
        result = services.app.AsyncResult(task_id)
        try:
            # The callbacks of a chord are sent before the chord's failure is stored.
            stored = result.ready()
            exc = result.result if stored and isinstance(result.result, BaseException) else None
        except NotImplementedError:
            # No result backend: the failure is known, if not its reason.
            stored, exc = True, None
        if not stored and self.request.retries < 5:
            raise self.retry(countdown=0.2)
        delivery = services.delivery(header, header.get('claim', ''))
        delivery.fail('raised', exception_facts(exc))

    return replacement_failed
