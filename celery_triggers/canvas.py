"""Canvas primitives: the gate, which waits for triggers, and the signature of a firing."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, cast

from celery import states
from celery.canvas import Signature, maybe_signature
from celery.result import EagerResult
from celery.utils.time import maybe_make_aware
from kombu.exceptions import EncodeError
from kombu.utils.uuid import uuid

from celery_triggers.engine.calls import FIRE, GATE, RUN, marked, placeholders
from celery_triggers.engine.conditions import Condition
from celery_triggers.engine.configuration import TaskConfig, parse_task
from celery_triggers.engine.forms import refuse_ambiguous_unless
from celery_triggers.engine.gates import Gate as StoredGate
from celery_triggers.engine.gates import gate_config
from celery_triggers.engine.names import check_uid, is_outcome_trigger, problem_with
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    InvalidConfiguration,
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.gates import apply_gate
from celery_triggers.task import header_of

__all__ = ['Gate', 'fire', 'gate']

logger = logging.getLogger(__name__)

#: For how many seconds a worker tries to store a gate while the storage is down.
PATIENCE = 10.0

#: The option of a signature that holds what a gate was told.
_SPOKEN = 'triggers_gate'

#: Options of ``apply_async`` that are alive or of one call alone, and not stored.
_NOT_STORED = frozenset({
    'producer', 'connection', 'publisher', 'add_to_parent', 'retry', 'retry_policy', 'router',
    'result_cls', 'task_type', 'task_id', 'countdown', 'eta', _SPOKEN,
})


def gate(
    sig: Any,
    *,
    after: Any = None,
    unless: Any = None,
    and_every: Any = None,
    within: float | None = None,
    until: datetime | None = None,
    uid: str | None = None,
    trigger_name: str | None = None,
    fresh: bool = False,
) -> Gate:
    """Return a signature that waits for triggers before it is sent.

    It can stand wherever Celery takes a signature: alone, in a chain, in a group, in the
    header of a chord or as its body, as a callback. Applied, it is stored in its session;
    when its condition holds it is sent under the same task id.

    Args:
        sig: A signature, a task, or a canvas: a chain, a group or a chord.
        after: What must have been fired: trigger names, tasks or a condition. Without it,
            and without ``and_every``, it is sent at once, and its end still fires its name.
        unless: What forbids it. For more than one trigger write ``any_of(...)`` or
            ``all_of(...)``.
        and_every: The trigger of which each firing sends a fresh copy. Such a gate stands
            alone, never in a canvas.
        within: In how many seconds from when it is applied it expires if it still waits.
        until: When it does, as an aware datetime.
        uid: The session. Without one that of the trigger task in which it is applied, or of
            which it is made part; else the id of the task with which the canvas began.
        trigger_name: What is fired when it has run; by default ``gate:<task id>``.
        fresh: Whether only what is fired after it was applied counts.

    Raises:
        InvalidConfiguration: The condition is wrong; nothing was stored.
        TypeError: ``sig`` is no signature, or ``until`` no aware datetime.
    """
    signature = _signature(sig)
    spoken = {
        'directives': _directives(signature, after, unless, and_every, within),
        'until': _iso(until),
        'uid': None if uid is None else check_uid(uid),
        'trigger_name': _checked_name(trigger_name),
        'fresh': bool(fresh),
    }
    # That of a canvas is its tasks'.
    app = signature.app if signature.subtask_type else signature._app
    made: Any = Gate(_contents(signature), app=app)  # type: ignore[arg-type]
    made._type = None if signature.subtask_type else signature._type
    made.options[_SPOKEN] = {name: value for name, value in spoken.items() if value}
    return cast(Gate, made)


def _signature(sig: Any) -> Any:
    if not isinstance(sig, Mapping) and hasattr(sig, 's'):
        sig = sig.s()
    if not isinstance(sig, Mapping):
        raise TypeError(f'a gate takes a signature, such as ship.s(), not {sig!r}')
    return maybe_signature(sig)


def _contents(signature: Any) -> dict[str, Any]:
    """Return the mapping of a gate; a canvas in it is what a task of this package runs."""
    clone = signature.clone()
    call: dict[str, Any] = {'task': clone.task, 'args': clone.args, 'kwargs': clone.kwargs}
    options = clone.options
    if signature.subtask_type:
        call, options = {'task': RUN, 'args': (), 'kwargs': {'canvas': clone}}, {}
    call = marked(call)
    list(placeholders(call))
    return {
        **call, 'options': options, 'subtask_type': GATE, 'immutable': bool(signature.immutable),
    }


def _directives(
    signature: Any, after: Any, unless: Any, and_every: Any, within: Any
) -> str:
    """Return the condition as canonical JSON.

    Raises:
        InvalidConfiguration: It names the directive at fault.
    """
    refuse_ambiguous_unless(unless, task=None)
    named = {
        'after': after, 'unless': unless, 'and_every': and_every, 'within': within,
        'run': RUN if signature.subtask_type else str(signature.task),
    }
    resolved = {
        name: _resolved(signature, value) for name, value in named.items() if value is not None
    }
    directives = parse_task('gate', resolved, conditional=False).to_json()
    return json.dumps(directives, sort_keys=True, separators=(',', ':'))


def _resolved(signature: Any, value: Any) -> Any:
    """Replace tasks in a condition by the names of their triggers."""
    if isinstance(value, (str, bool, int, float, Mapping)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        members = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_resolved(signature, member) for member in members]
    trigger_of = signature.app.triggers.trigger_of
    if isinstance(value, Condition):
        return value.resolved(trigger_of)
    return trigger_of(value)


def _iso(until: Any) -> str | None:
    if until is None:
        return None
    if not isinstance(until, datetime) or until.utcoffset() is None:
        raise TypeError(
            'until= is an aware datetime, such as '
            f'datetime.now(timezone.utc) + timedelta(hours=1), not {until!r}'
        )
    return until.astimezone(timezone.utc).isoformat()


def _checked_name(name: Any) -> str | None:
    problem = None if name is None else problem_with(name)
    if problem is None and name is not None and is_outcome_trigger(name):
        problem = 'must not end like the name of an outcome (":failed", ":revoked", ...)'
    if problem:
        raise InvalidConfiguration(
            f'the name of a gate {problem}: {name!r}', directive='trigger_name'
        )
    return None if name is None else str(name)


@Signature.register_type(name=GATE)
class Gate(Signature):
    """A signature that waits for triggers; made by :func:`gate`.

    Whoever applies it, Celery when its turn comes, say, stores it in a session and sends
    nothing. Applying the same task id again does nothing.
    """

    @classmethod
    def from_dict(cls, d: Any, app: Any = None) -> Gate:
        return cls(d, app=app)

    @property
    def spoken(self) -> dict[str, Any]:
        """What the gate was told: ``{"directives", "until", "uid", "trigger_name", "fresh"}``."""
        return cast('dict[str, Any]', self.options[_SPOKEN])

    @property
    def config(self) -> TaskConfig:
        """Its condition, as that of a trigger task."""
        return gate_config(
            self.spoken.get('trigger_name') or 'gate', self.spoken['directives']
        )

    def __repr__(self) -> str:
        config = self.config
        facts = [f'after={config.after.to_json()!r}'] if len(config.after) else []
        facts += [f'unless={config.unless.to_json()!r}'] if len(config.unless) else []
        facts += [f'and_every={config.and_every!r}'] if config.and_every else []
        inner = self.kwargs['canvas'] if self.task == RUN else self.reprcall()
        return f'gate({", ".join([str(inner), *facts])})'

    def freeze(self, *args: Any, **kwargs: Any) -> Any:
        """Finalize it as part of a canvas, which Celery does before it applies one.

        Raises:
            InvalidConfiguration: It has ``and_every``, so that it has no single result.
        """
        if self.config.and_every is not None:
            raise InvalidConfiguration(
                'such a gate sends a copy for each firing and has no single result, so it '
                'cannot be part of a chain, a group or a chord, nor replace a task; apply it by '
                'itself', directive='andEvery',
            )
        self._settle_uid()
        return super().freeze(*args, **kwargs)

    _freeze = freeze

    def _settle_uid(self) -> None:
        """Take the session of the trigger task that runs here, if it has none yet."""
        task = self.app.current_worker_task
        header = header_of(task.request) if task is not None else None
        if header is not None and 'uid' not in self.spoken:
            self.options[_SPOKEN] = {**self.spoken, 'uid': header['uid']}

    # ---------------------------------------------------------------- applying

    def apply_async(
        self, args: Any = None, kwargs: Any = None, route_name: str | None = None, **options: Any
    ) -> Any:
        """Store the gate; it is sent when its condition holds, at once if it does.

        Returns:
            The result of what it sends. Its state is ``WAITING`` until then.

        Raises:
            InvalidConfiguration: It cannot stand where it does.
            TriggersError: ``triggers_serializer`` cannot take its arguments.
            StorageUnavailable: The storage did not answer; applying the same gate again is
                safe if it was frozen, since it is stored once for each task id.
        """
        applying = _Applying(self, args, kwargs, route_name, options)
        if self.app.conf.task_always_eager:
            return applying.eagerly()
        return applying.apply()

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run it here and now if its condition holds; else store it.

        Returns:
            The result; one of state ``IGNORED`` if it waits.

        Raises:
            TriggersError: It is part of a canvas that runs here and now, in which nothing
                can wait, and its condition does not hold.
        """
        return _Applying(self, args, kwargs, None, options).eagerly()


class _Applying:
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
        self.task_id: str = self.options.get('task_id') or uuid()
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
        manager.follow_up(outcome)
        return self._result()

    def _manager(self) -> Any:
        return self.app.triggers.session(self.uid)

    def _store(self, manager: Any, waits: Any = None) -> Any:
        self._check_alone()
        self._warn()
        return apply_gate(
            manager, self.name, self.task_id, self._stored(manager),
            until=self._milliseconds(self.gate.spoken.get('until')),
            fresh=self.gate.spoken.get('fresh', False),
            waits=waits,
        )

    def _stored(self, manager: Any) -> StoredGate:
        """Return what is stored of it.

        Raises:
            TriggersError: The serializer cannot take it.
        """
        options = {
            name: value for name, value in self.options.items()
            if name not in _NOT_STORED and value is not None
        }
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
        return StoredGate(
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
            self.app.triggers.show_waiting(self.task_id, self.uid, instance)

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
        if not getattr(self.app.triggers, 'is_attended', True):
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
            manager.follow_up(outcome)
            return EagerResult(self.task_id, None, states.IGNORED, name=self.gate.task)
        return self.app.triggers.run_here(manager, outcome, self.task_id)

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
            and not isinstance(caller, Gate)
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


# ----------------------------------------------------------------------- fire


class _Fire:
    """The signature of a firing: ``fire.s(uid, trigger_name)``.

    In a chain the previous result, a mapping, joins the kwargs. The task behind it,
    ``celery_triggers.fire``, can be sent from any language.
    """

    def s(self, uid: str, trigger_name: str, trigger_kwargs: Any = None, **options: Any) -> Any:
        """Return the signature of a firing.

        Args:
            uid: The session.
            trigger_kwargs: A mapping; the previous result's values win over them.
            options: ``event_id``, without which one is made of the task's id.
        """
        kwargs = {'uid': uid, 'trigger_name': trigger_name, **options}
        if trigger_kwargs is not None:
            kwargs['trigger_kwargs'] = trigger_kwargs
        return Signature(FIRE, kwargs=kwargs)

    def si(self, uid: str, trigger_name: str, trigger_kwargs: Any = None, **options: Any) -> Any:
        """As :meth:`s`, without the previous result of a chain."""
        return self.s(uid, trigger_name, trigger_kwargs, **options).set(immutable=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to fire: that is ``app.triggers.fire``."""
        raise TypeError(
            'fire is the signature of a firing, for a canvas: write fire.s(uid, trigger_name). '
            'To fire here and now call app.triggers.fire(uid, trigger_name, trigger_kwargs)'
        )

    def __repr__(self) -> str:
        return '<fire: the signature of a firing>'


fire = _Fire()
