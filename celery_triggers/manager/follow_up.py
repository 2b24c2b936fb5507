"""A change of a session is made, and followed up: what it released is sent, hooks are called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from celery_triggers.engine import plans
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.session import Plan
from celery_triggers.engine.step import Step
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.change import Change, Outcome
from celery_triggers.manager.controller import Controller, is_finalizing
from celery_triggers.manager.release import Release, endings, releases, serving

__all__ = ['call_hooks', 'follow_up', 'follow_up_all', 'make_change', 'prepare', 'released_by']

logger = logging.getLogger(__name__)

T = TypeVar('T')


def prepare(
    manager: Controller,
    planner: plans.Planner,
    decide: Callable[[Step], T],
    *,
    event_id: str | None = None,
    identity: tuple[str, Any] = ('', None),
) -> Change[T]:
    """Return a change of the session that is still to be made and followed up.

    Args:
        planner: Returns what must be read.
        decide: Makes the change on a step; it may be called more than once.
        event_id: The application's id for this change.
        identity: What the id stands for, to tell a repeat from a conflict.

    Raises:
        StorageNotConfigured: Workers look for sessions elsewhere.
    """
    manager.storage.application.check_storage(manager.storage)
    return Change(
        manager.storage,
        planner,
        decide,
        manager=manager.key,
        finalizing=is_finalizing,
        event_id=event_id,
        identity=identity,
    )


def make_change(
    manager: Controller, planner: plans.Planner, decide: Callable[[Step], T]
) -> Outcome[T]:
    """Make a change of the session, then send what it released and call the hooks."""
    outcome = prepare(manager, planner, decide).make()
    follow_up(manager, outcome)
    return outcome


def follow_up(manager: Controller, outcome: Outcome[T]) -> None:
    """Send what a change released and call the hooks, unless an earlier call did so."""
    follow_up_all([(manager, outcome)])


def released_by(manager: Controller, outcome: Outcome[Any]) -> list[Release]:
    """Return what a change released, for the task runners."""
    draft = outcome.draft
    if draft is None:
        return _released_under(manager, outcome.record.released)
    incarnation = draft.session.head.incarnation
    sent = [manager.storage.wrap(draft.session, draft.touched[name]) for name in draft.to_send]
    ended = [manager.storage.wrap(draft.session, draft.touched[name]) for name in draft.to_end]
    return [
        *releases(manager, sent, incarnation, draft.now), *endings(manager, ended, incarnation)
    ]


def _released_under(manager: Controller, names: Sequence[str]) -> list[Release]:
    """Return what a commit released whose answer was lost; only names are left of it."""
    if not names:
        return []
    try:
        found = manager.storage.read(Plan(instances=frozenset(names)))
    except StorageUnavailable as exc:
        # What was fired is committed, and each of them has a due date.
        logger.warning('%s of session %r are sent later: %s', names, manager.uid, exc)
        return []
    session = found.session
    wrapped = [
        manager.storage.wrap(session, session.instances[name])
        for name in names
        if name in session.instances
    ]
    # Those that have to wait are left to their due dates.
    ready = [instance for instance in wrapped if instance.record.eta <= found.now]
    return releases(manager, ready, session.head.incarnation, found.now)


def call_hooks(manager: Controller, draft: Draft) -> None:
    """Call the hooks of a manager for what a change has done, and log which loops it stopped."""
    for stopped in draft.stopped:
        logger.error('session %r: %s', manager.uid, stopped)
    for firing in draft.records:
        scheduled = [
            manager.storage.wrap(draft.session, draft.touched[name]) for name in firing.released
        ]
        _hook(manager, '_post_fire', firing.trigger, scheduled)
    for name in draft.replayed:
        _hook(manager, '_post_replay', manager.storage.wrap(draft.session, draft.touched[name]))
    for name, cascade in draft.skipped:
        instance = manager.storage.wrap(draft.session, draft.touched[name])
        _hook(manager, '_post_skip', instance, cascade)


def _hook(manager: Controller, name: str, *args: Any) -> None:
    try:
        getattr(manager, name)(*args)
    except Exception:
        # Documented: hooks run after the commit and undo nothing.
        logger.exception('hook %s of session %r failed', name, manager.uid)


def follow_up_all(ended: Sequence[tuple[Controller, Outcome[Any]]]) -> None:
    """Send what changes of sessions of one application released, and call their hooks.

    Messages share the wait for the broker. What an earlier call did is left alone. Where the
    changes are part of a transaction of the application's, that waits for its commit.

    Raises:
        Exception: The first that eager tasks raised, after everything else was done.
    """
    if ended:
        ended[0][0].storage.after_commit(lambda: _follow_up_now(ended))


def _follow_up_now(ended: Sequence[tuple[Controller, Outcome[Any]]]) -> None:
    fresh = [
        (serving(manager, outcome.manager), outcome)
        for manager, outcome in ended
        if not outcome.duplicate
    ]
    releases = [
        release for manager, outcome in fresh for release in released_by(manager, outcome)
    ]
    error: Exception | None = None
    if releases:
        try:
            releases[0].manager.storage.application.dispatch(releases)
        except Exception as exc:  # noqa: BLE001
            # Only what an eager task raised comes here; the hooks are called all the same.
            error = exc
    for manager, outcome in fresh:
        if outcome.draft is not None:
            call_hooks(manager, outcome.draft)
    if error is not None:
        raise error
