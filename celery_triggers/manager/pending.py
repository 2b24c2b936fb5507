"""Firings that are accepted and not applied yet: they are due later, or part of a transaction."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from itertools import count
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.names import check_trigger
from celery_triggers.engine.session import Plan
from celery_triggers.engine.step import Step
from celery_triggers.exceptions import InvalidFiring, TriggersError
from celery_triggers.manager.checks import (
    check_runner,
    checked_delay,
    checked_event_id,
    checked_kwargs,
    depth_in,
    ready_firing,
)
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.firing import Delay, Firing, ReadyFiring, Run
from celery_triggers.manager.follow_up import follow_up, make_change
from celery_triggers.manager.release import serving
from celery_triggers.storages.records import StoredFiring

__all__ = [
    'DelayedChange', 'apply_stored', 'cancel_firing', 'cancel_stored', 'change_delayed', 'ready',
]

logger = logging.getLogger(__name__)


class DelayedChange(Enum):
    """What came of a change about a delayed firing."""

    DONE = 'done'
    #: It was not to be made now.
    REFUSED = 'refused'
    #: The session has no such firing.
    UNKNOWN = 'unknown'


def ready(
    manager: Controller,
    trigger_name: str,
    trigger_kwargs: Mapping[str, Any] | None = None,
    *,
    event_id: str | None = None,
    countdown: float | None = None,
    eta: datetime | None = None,
    connection: Any = None,
    run: Run | None = None,
) -> ReadyFiring:
    """Check a firing, with the arguments of :meth:`.TriggerManager.fire`, and change nothing yet.

    Args:
        run: The run that fires it, which must still have its claim then.
    """
    trigger = check_trigger(manager.uid, trigger_name)
    kwargs = checked_kwargs(manager, trigger, trigger_kwargs)
    event_id = checked_event_id(manager, trigger, event_id)
    delay = checked_delay(manager, trigger, countdown, eta)
    check_runner(manager)
    if delay is not None and event_id is None:
        # It has to be known until it is applied, however long that takes.
        event_id = secrets.token_hex(12)
    firing = ready_firing(manager, trigger, kwargs, event_id, delay, run)
    if manager.storage.takes_part(connection):
        firing.store = lambda: store(manager, trigger, kwargs, event_id, delay, run, connection)
    return firing


def cancel_firing(manager: Controller, event_id: str) -> bool:
    """Take back a delayed firing; tell whether it had not been applied yet.

    Its event id stays taken: a repeat does nothing.

    Raises:
        StorageUnavailable: The storage did not answer; calling again is safe.
    """
    done = change_delayed(manager, event_id, lambda step: step.cancel_delayed(event_id))
    return done is DelayedChange.DONE


def change_delayed(
    manager: Controller, event_id: str, decide: Callable[[Step], bool]
) -> DelayedChange:
    """Make a change about a delayed firing, in the session that has it now.

    Args:
        decide: Tells whether it has done something.

    Returns:
        What came of it.
    """
    found = manager.storage.read(Plan(delayed=frozenset({event_id}))).session
    delayed = found.delayed.get(event_id)
    if delayed is None:
        return DelayedChange.UNKNOWN
    incarnation = found.head.incarnation

    def decide_there(step: Step) -> bool:
        return step.session.head.incarnation == incarnation and decide(step)

    outcome = make_change(manager, plans.delayed_firing(event_id, delayed.trigger), decide_there)
    # Without a value this very change was found to have been made.
    return DelayedChange.REFUSED if outcome.value is False else DelayedChange.DONE


def store(
    manager: Controller,
    trigger: str,
    kwargs: dict[str, Any],
    event_id: str | None,
    delay: Delay | None,
    run: Run | None,
    connection: Any,
) -> Firing:
    """Store a firing within the application's transaction."""
    depth = 0
    if run is not None:
        # When it is applied the run may have ended well.
        plan = Plan(instances=frozenset({run.instance}))
        depth = depth_in(manager, manager.storage.read(plan).session, run, trigger)
    id_ = _new_id()
    stored = StoredFiring(
        id_, trigger, kwargs, event_id or id_,
        delay.milliseconds if delay else 0, bool(delay and delay.absolute), depth, manager.key,
    )
    now = manager.storage.store_firing(stored, connection, lambda: apply_stored(manager, id_))
    firing = Firing.stored(manager, stored, now, delay)
    firing.can_be_taken_back_by(lambda: cancel_stored(manager, id_, stored.event_id))
    return firing


def apply_stored(manager: Controller, id_: str) -> bool:
    """Apply a firing whose transaction was committed; tell whether it is there.

    One that is applied twice at the same time, or again after a crash, counts once: its
    event id sees to that. One that is refused now is logged and forgotten, since its
    transaction is over.

    Raises:
        StorageUnavailable: The storage did not answer; calling again is safe.
    """
    found = manager.storage.stored_firing(id_)
    if found is None:
        return False
    at, stored = found
    _apply(serving(manager, stored.manager), stored, at)
    return True


def _apply(manager: Controller, stored: StoredFiring, at: int) -> None:
    delay = None
    if stored.delay:
        delay = Delay(stored.delay if stored.absolute else at + stored.delay, absolute=True)
    ready = ready_firing(
        manager, stored.trigger, stored.kwargs, stored.event_id, delay, depth=stored.depth
    )
    outcome = None
    try:
        outcome = ready.change.make()
    except InvalidFiring:
        logger.exception(
            'session %r: the firing of %r (event id %r) is refused now that its transaction '
            'is committed', manager.uid, stored.trigger, stored.event_id,
        )
    manager.storage.forget_firing(stored.id)
    if outcome is not None:
        follow_up(manager, outcome)


def cancel_stored(manager: Controller, id_: str, event_id: str) -> bool:
    """Take back a delayed firing that was stored within a transaction.

    Raises:
        TriggersError: The transaction has not been committed.
        StorageUnavailable: The storage did not answer; calling again is safe.
    """
    if not apply_stored(manager, id_):
        plan = Plan(events=frozenset({event_id}))
        if event_id not in manager.storage.read(plan).session.events:
            raise TriggersError(
                f'the firing with the event id {event_id!r} of session {manager.uid!r} is part of '
                'a transaction that is not committed: roll that back instead'
            )
    return cancel_firing(manager, event_id)


_numbers = count()


def _new_id() -> str:
    """Return the key of a stored firing; later ones of this process come after it."""
    number = next(_numbers) % 0x100000000
    return f'{int(time.time() * 1000):012x}{number:08x}{secrets.token_hex(6)}'
