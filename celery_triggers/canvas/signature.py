"""Canvas primitives: the gate, which waits for triggers, and the signature of a firing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, cast
from uuid import NAMESPACE_OID, uuid5

from celery.canvas import Signature, maybe_signature

from celery_triggers.canvas.applying import Applying
from celery_triggers.engine.calls import FIRE, GATE, RUN, SPOKEN, marked, placeholders
from celery_triggers.engine.conditions import Condition
from celery_triggers.engine.configuration import parse_task
from celery_triggers.engine.forms import refuse_ambiguous_unless
from celery_triggers.engine.gates import gate_config
from celery_triggers.engine.names import check_uid, problem_with_task_name
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.manager.header import header_in
from celery_triggers.wiring import services_of

__all__ = ['Gate', 'fire', 'gate']


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
    made.options[SPOKEN] = {name: value for name, value in spoken.items() if value}
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
    trigger_of = services_of(signature.app).trigger_of
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
    if name is None:
        return None
    problem = problem_with_task_name(name)
    if problem:
        raise InvalidConfiguration(
            f'the name of a gate {problem}: {name!r}', directive='trigger_name'
        )
    return str(name)


def _content(signature: Mapping[str, Any]) -> Any:
    """Return what tells a gate from other callbacks of a task."""
    if signature.get('subtask_type') != GATE:
        return None
    return [signature['task'], signature['kwargs'], signature['options'].get(SPOKEN)]


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
        return cast('dict[str, Any]', self.options[SPOKEN])

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
        if 'task_id' not in self.options and not (args or kwargs.get('_id')):
            kwargs['_id'] = self.id_as_callback()
        return super().freeze(*args, **kwargs)

    _freeze = freeze

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run the task here, past its condition.

        Celery calls error callbacks of three arguments so, which cannot be kept for later.
        """
        raise TypeError(
            'a gate waits, so it cannot be called: use apply_async(). As an error callback its '
            'task takes one argument, the id of the task that failed'
        )

    def id_as_callback(self) -> str | None:
        """Return its task id if it is a callback of the task that runs here.

        Celery gives a callback a new id each time its task is delivered. This one is always
        the same, so that the gate is stored once.
        """
        request = getattr(self.app.current_worker_task, 'request', None)
        if request is None:
            return None
        callbacks = [*(request.callbacks or ()), *(request.errbacks or ())]
        if not any(_content(callback) == _content(self) for callback in callbacks):
            return None
        text = json.dumps([request.id, _content(self)], sort_keys=True, default=repr)
        return str(uuid5(NAMESPACE_OID, text))

    def _settle_uid(self) -> None:
        """Take the session of the trigger task that runs here, if it has none yet."""
        task = self.app.current_worker_task
        header = header_in(task.request) if task is not None else None
        if header is not None and 'uid' not in self.spoken:
            self.options[SPOKEN] = {**self.spoken, 'uid': header['uid']}

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
        applying = Applying(self, args, kwargs, route_name, options)
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
        return Applying(self, args, kwargs, None, options).eagerly()


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
