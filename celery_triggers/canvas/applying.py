"""What happens when a gate is applied: it is stored in its session, or run here and now."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from celery import states
from celery.result import EagerResult
from celery.utils.time import maybe_make_aware
from kombu.exceptions import EncodeError
from kombu.utils.uuid import uuid

from celery_triggers.engine.calls import GATE, SPOKEN
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    InvalidConfiguration,
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.manager.follow_up import follow_up
from celery_triggers.manager.gate_life import apply_gate
from celery_triggers.manager.header import header_in
from celery_triggers.wiring import services_of

__all__ = ['Applying']

logger = logging.getLogger(__name__)

#: For how many seconds a worker tries to store a gate while the storage is down.
PATIENCE = 10.0

#: Options of ``apply_async`` that are alive or of one call alone, and not stored.
_NOT_STORED = frozenset({
    'producer', 'connection', 'publisher', 'add_to_parent', 'retry', 'retry_policy', 'router',
    'result_cls', 'task_type', 'task_id', 'countdown', 'eta', SPOKEN,
})


class Applying:
    """One application of a gate."""

    def __init__(
        self, gate: Any, args: Any, kwargs: Any, route_name: str | None, options: dict[str, Any]
    ):
        self.app: Any = gate.app
        self.gate = gate
        given = {name: value for name, value in options.items() if value is not None}
        _, _, self.options = self.gate._merge(None, None, given)
        self.args = [] if gate.immutable else list(args or ())
        self.kwargs = {} if gate.immutable else dict(kwargs or {})
        if route_name is not None:
            self.options['route_name'] = route_name
        self.task_id: str = self.options.get('task_id') or gate.id_as_callback() or uuid()
        self.parent = self.app.current_worker_task
        self._know_family()
        gate._settle_uid()
        spoken = gate.spoken
        self.uid: str = spoken.get('uid') or self.options['root_id']
        self.name: str = spoken.get('trigger_name') or f'gate:{self.task_id}'
        self.config = gate.config

    def _know_family(self) -> None:
        """Settle what Celery would say where a message is sent, which is elsewhere, later."""
        if self.parent is not None:
            request = self.parent.request
            self.options.setdefault('root_id', request.root_id or request.id)
            self.options.setdefault('parent_id', request.id)
            if self.app.conf.task_inherit_parent_priority:
                priority = (request.delivery_info or {}).get('priority')
                if priority is not None:
                    self.options.setdefault('priority', priority)
        self.options.setdefault('root_id', self.task_id)

    # --------------------------------------------------------------- in a worker

    def apply(self) -> Any:
        """Store the gate and return its result."""
        manager = self._manager()
        deadline = time.monotonic() + (PATIENCE if self.parent is not None else 0)
        while True:
            try:
                outcome = self._store(manager, waits=self._show_waiting)
                break
            except StorageUnavailable:
                # In a worker Celery would fail the task that came before it.
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.25)
        follow_up(manager, outcome)
        return self._result()

    def _manager(self) -> Any:
        return services_of(self.app).session(self.uid)

    def _store(self, manager: Any, waits: Any = None) -> Any:
        self._check_alone()
        self._warn()
        return apply_gate(
            manager, self.name, self.task_id, self._stored(manager),
            until=self._milliseconds(self.gate.spoken.get('until')),
            fresh=self.gate.spoken.get('fresh', False),
            place=self._place(),
            waits=waits,
        )

    def _place(self) -> str:
        """Return the instance in whose place the gate stands, by ``Task.replace``."""
        request: Any = self.parent.request if self.parent is not None else None
        header = header_in(request)
        if header is not None and request.id == self.task_id:
            return str(header['instance'])
        return str(self.gate.spoken.get('place', ''))

    def _stored(self, manager: Any) -> Gate:
        """Return what is stored of it.

        Raises:
            TriggersError: The serializer cannot take it.
        """
        options = {
            name: value for name, value in self.options.items()
            if name not in _NOT_STORED and value is not None
        }
        if self._ignores_result:
            options['ignore_result'] = True
        call = {
            'task': self.gate.task, 'args': list(self.gate.args), 'kwargs': self.gate.kwargs,
            'options': options,
        }
        try:
            call, args, kwargs = manager.storage.codec.copy([call, self.args, self.kwargs])
        except EncodeError as exc:
            raise TriggersError(
                f'{self.gate!r} cannot be stored, triggers_serializer '
                f'({manager.storage.settings.serializer}) does not take it: {exc}'
            ) from exc
        eta = self.options.get('eta')
        return Gate(
            self.gate.spoken['directives'], call, args, kwargs,
            delay=int(float(self.options.get('countdown') or 0) * 1000),
            eta=self._milliseconds(eta),
            template=self.config.and_every is not None,
        )

    def _milliseconds(self, date: Any) -> int:
        if not date:
            return 0
        if isinstance(date, str):
            date = datetime.fromisoformat(date)
        return max(1, int(maybe_make_aware(date, self.app.timezone).timestamp() * 1000))

    def _check_alone(self) -> None:
        joined = [name for name in ('chain', 'chord', 'group_id') if self.options.get(name)]
        if self.config.and_every is not None and joined:
            raise InvalidConfiguration(
                'a gate that sends a copy for each firing has no single result, so it cannot '
                'be part of a chain, a group or a chord', directive='andEvery',
            )

    def _show_waiting(self, instance: str) -> None:
        if not self._ignores_result:
            services_of(self.app).show_waiting(self.task_id, self.uid, instance)

    @property
    def _ignores_result(self) -> bool:
        task = self.app.tasks.get(self.gate.task)
        return bool(self.options.get('ignore_result', getattr(task, 'ignore_result', False)))

    def _result(self) -> Any:
        result = self.gate.AsyncResult(self.task_id)
        result.ignored = self._ignores_result
        if self.parent is not None and self.options.get('add_to_parent', True):
            self.parent.add_trail(result)
        return result

    def _warn(self) -> None:
        if self.options.get('chord'):
            warn_about_join(self.app, self.config, self.gate.spoken.get('until'))
        if not services_of(self.app).is_attended:
            _warn_once('unattended', (
                'a gate is applied in a worker that does not look after sessions: set '
                'triggers_storage, so that its workers sweep'
            ))

    # ------------------------------------------------------------ here and now

    def eagerly(self) -> Any:
        """Run it here and now if its condition holds, else store it.

        Raises:
            TriggersError: It would have to wait in a canvas that runs here and now.
        """
        manager = self._manager()
        if _in_eager_canvas() and not self._holds(manager):
            raise TriggersError(
                f'{self.gate!r} would have to wait, and nothing can wait in a canvas that runs '
                f'here and now: fire what it waits for into session {self.uid!r} first'
            )
        outcome = self._store(manager)
        if outcome.value is not Status.SCHEDULED:
            follow_up(manager, outcome)
            return EagerResult(self.task_id, None, states.IGNORED, name=self.gate.task)
        return services_of(self.app).run_here(manager, outcome, self.task_id)

    def _holds(self, manager: Any) -> bool:
        """Tell whether it would be released at once."""
        if self.gate.spoken.get('fresh'):
            return not len(self.config.after)
        latest = manager.storage.load().latest
        received = {
            leaf.key for leaf in self.config.leaves
            if leaf.trigger in latest and latest[leaf.trigger].of(leaf.where) is not None
        }
        unless = self.config.unless.holds(received)
        return self.config.wanted.holds(received) and not unless


def _in_eager_canvas() -> bool:
    """Tell whether a chain, a group or a chord that runs here and now applies the gate.

    Celery tells its members nothing of it, so the frames that have called are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get('self')
        if (
            frame.f_globals.get('__name__') == 'celery.canvas'
            and frame.f_code.co_name == 'apply'
            and not (isinstance(caller, Mapping) and caller.get('subtask_type') == GATE)
        ):
            return True
        if frame.f_globals.get('__name__') == 'celery.app.trace':
            # A task that runs inside one and applies a gate of its own.
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


# ------------------------------------------------------------------- warnings


def warn_about_join(app: Any, config: TaskConfig, until: str | None) -> None:
    """Warn about a gate in the header of a chord whose join does not last as long as it waits."""
    backend = app.backend
    if not getattr(backend, 'supports_native_join', False):
        _warn_once('polling', (
            f'a gate waits in the header of a chord, and the result backend '
            f'{type(backend).__name__} cannot join by itself: until the gate has ended Celery '
            'polls, with a message celery.chord_unlock a second. A Redis result backend does not'
        ))
        return
    expires = getattr(backend, 'chord_expires', None)
    waits: float | None = config.within
    if until is not None:
        left = (datetime.fromisoformat(until) - datetime.now(timezone.utc)).total_seconds()
        waits = left if waits is None else min(left, waits)
    if expires and (waits is None or waits > expires):
        how_long = 'for an unknown time' if waits is None else f'for up to {waits:.0f} seconds'
        _warn_once('join', (
            f'a gate waits {how_long} in the header of a chord, whose join the result backend '
            f'forgets after {expires} seconds, and then its body never runs: set '
            'result_chord_expires to 0 (never) or to more than the gate may wait'
        ))


_warned: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(message)
