"""A firing's input is checked, and the firing made ready; nothing is changed yet."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kombu.exceptions import EncodeError

from celery_triggers.engine import plans
from celery_triggers.engine.configuration import MOST_SECONDS, Configuration
from celery_triggers.engine.names import SESSION_FINALIZED, plain, problem_with
from celery_triggers.engine.session import Session
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    CascadeLimitExceeded,
    ClaimLost,
    InvalidFiring,
    UnheardTrigger,
    UnknownKey,
)
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.firing import Delay, ReadyFiring, Run
from celery_triggers.manager.follow_up import prepare
from celery_triggers.registry import task_runners

__all__ = [
    'check_runner',
    'checked_delay',
    'checked_event_id',
    'checked_kwargs',
    'depth_in',
    'milliseconds',
    'ready_firing',
]

logger = logging.getLogger(__name__)


def ready_firing(
    manager: Controller,
    trigger: str,
    kwargs: dict[str, Any],
    event_id: str | None,
    delay: Delay | None,
    run: Run | None = None,
    depth: int = 0,
) -> ReadyFiring:
    """Return a firing whose input was checked.

    Args:
        depth: How many cascades in a row lead to it, where no run tells.
    """
    def decide(step: Step) -> None:
        session = step.session
        known = depth if run is None else depth_in(manager, session, run, trigger)
        # The session's own manager counts, whichever class this firing came through.
        if trigger == SESSION_FINALIZED and step.cascade.finalizing:
            raise InvalidFiring(
                f'{trigger!r} is fired by the finalizing manager, never by hand',
                uid=manager.uid, trigger=trigger,
            )
        if not session.configuration.listeners(trigger) and not session.gates_waiting_for(
            trigger
        ):
            _unheard(manager, session.configuration, trigger)
        due = delay.due(step.now) if delay is not None else 0
        if event_id is not None and due > step.now:
            step.delay(event_id, trigger, kwargs, due)
        else:
            step.fire(trigger, kwargs, event_id=event_id, depth=known)

    planner = plans.firing(trigger) if run is None else plans.firing_of(run.instance, trigger)
    change = prepare(manager, planner, decide, event_id=event_id, identity=(trigger, kwargs))
    return ReadyFiring(manager, trigger, kwargs, change)


def depth_in(manager: Controller, session: Session, run: Run, trigger: str) -> int:
    """Return how many cascades in a row lead to what a run fires.

    Raises:
        ClaimLost: The run no longer is what its instance stands for.
        CascadeLimitExceeded: The run fires its way round a loop.
    """
    instance = session.instance(run.instance)
    why = None
    if session.head.incarnation != run.incarnation or instance is None:
        why = 'its session was deleted'
    elif instance.task_id != run.task_id or instance.attempt != run.attempt:
        why = 'its attempt is over'
    elif run.token and (instance.status, instance.token) != (Status.RUNNING, run.token):
        why = f'its claim is gone, the instance is {instance.status}'
    if why is not None:
        raise ClaimLost(
            f'{run.instance} of session {manager.uid!r} cannot fire {trigger!r} any more: {why}',
            uid=manager.uid, trigger=trigger, instance=run.instance,
        )
    assert instance is not None
    most = manager.storage.settings.limits.max_cascade
    if instance.cascade >= most and session.configuration.listeners(trigger):
        raise CascadeLimitExceeded(
            f'{run.instance} of session {manager.uid!r} fires {trigger!r} after '
            f'{instance.cascade} cascades in a row, as many as triggers_max_cascade allows',
            uid=manager.uid, trigger=trigger, limit=most,
        )
    return instance.cascade + 1


def checked_kwargs(
    manager: Controller, trigger: str, kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a copy of a trigger's kwargs, as readers of the storage will see them.

    Raises:
        InvalidFiring: They are no mapping with string keys or cannot be serialized.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise InvalidFiring(
            f'the kwargs of {trigger!r} must be a mapping with string keys, not {kwargs!r}',
            uid=manager.uid, trigger=trigger,
        )
    try:
        # So that later changes of the caller's do not show.
        copy: dict[str, Any] = manager.storage.codec.copy(dict(kwargs))
    except EncodeError as exc:
        raise InvalidFiring(
            f'the kwargs of {trigger!r} cannot be serialized '
            f'({manager.storage.settings.serializer}): {exc}',
            uid=manager.uid, trigger=trigger,
        ) from exc
    return copy


def checked_event_id(manager: Controller, trigger: str, event_id: Any) -> str | None:
    """Return an event id that can be stored; ``None`` where none was given.

    Raises:
        InvalidFiring: It is no text, or one that cannot be stored.
    """
    if event_id is None:
        return None
    problem = problem_with(event_id)
    if problem:
        raise InvalidFiring(
            f'an event id {problem}: {event_id!r}', uid=manager.uid, trigger=trigger
        )
    return plain(event_id)


def checked_delay(manager: Controller, trigger: str, countdown: Any, eta: Any) -> Delay | None:
    """Return when a firing is due."""
    problem = None
    if countdown is not None and eta is not None:
        problem = 'has a countdown or an eta, not both'
    elif countdown is not None:
        number = isinstance(countdown, (int, float)) and not isinstance(countdown, bool)
        if number and countdown <= MOST_SECONDS:
            return Delay(int(countdown * 1000))
        problem = f'has a countdown of seconds up to {MOST_SECONDS:.0e}, not {countdown!r}'
    elif eta is not None:
        due = milliseconds(eta)
        if due is not None:
            return Delay(due, absolute=True)
        problem = f'has an aware datetime as its eta, not {eta!r}'
    if problem is not None:
        raise InvalidFiring(f'a firing {problem}', uid=manager.uid, trigger=trigger)
    return None


def check_runner(manager: Controller) -> None:
    """Refuse to fire where the runner of most tasks is not registered."""
    runner = manager.default_task_runner_name or manager.storage.settings.runner
    if runner not in task_runners:
        raise UnknownKey('task runner', runner, task_runners.known())


def _unheard(manager: Controller, configuration: Configuration, trigger: str) -> None:
    application = manager.storage.application
    reaction = manager.storage.settings.unheard
    if reaction == 'ignore':
        return
    if application.configuration_for(manager.uid).listeners(trigger):
        if not configuration:
            _warn_once(
                trigger,
                f'session {manager.uid!r} began in a process that knew no trigger task for '
                f'it, so nobody in it listens to {trigger!r}; import the modules with '
                'trigger tasks wherever triggers are fired, and give this session its '
                'trigger tasks with update_configuration(..., apply_past=True)',
            )
        return
    names = sorted({name for task in configuration.values() for name in task.triggers})
    near = difflib.get_close_matches(trigger, names, n=1)
    message = (
        f'no trigger task of session {manager.uid!r} listens to {trigger!r}; they listen '
        f'to: {", ".join(names) or "nothing, it has no trigger task"}'
        + (f'; did you mean {near[0]!r}?' if near else '')
    )
    if reaction == 'raise':
        raise UnheardTrigger(message, uid=manager.uid, trigger=trigger)
    _warn_once(trigger, message)


def milliseconds(at: Any) -> int | None:
    """Return the moment of an aware datetime; ``None`` if it is none."""
    if not isinstance(at, datetime) or at.utcoffset() is None:
        return None
    # 0 stands for no date.
    return max(1, int(at.timestamp() * 1000))


_warned_about: set[str] = set()
_MOST_WARNED_ABOUT = 10_000


def _warn_once(trigger: str, message: str) -> None:
    """Warn about a trigger's name once in this process."""
    if trigger not in _warned_about:
        if len(_warned_about) >= _MOST_WARNED_ABOUT:
            _warned_about.clear()
        _warned_about.add(trigger)
        logger.warning(message)
