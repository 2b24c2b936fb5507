"""How a session is controlled: changes made, what they released sent, hooks called.

The operations themselves are :class:`celery_triggers.manager.TriggerManager`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from celery_triggers.engine import plans
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.session import Plan
from celery_triggers.engine.step import Step
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import StorageUnavailable, TriggersError
from celery_triggers.manager.change import Change, Outcome
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import StorageTime, Write
from celery_triggers.storages.view import TaskInstance

__all__ = ['Controller', 'Release', 'follow_up_all']

logger = logging.getLogger(__name__)

T = TypeVar('T')

#: How often the wait is doubled for a message that nobody takes.
MOST_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Release:
    """A released instance on its way to a task runner.

    Attributes:
        config: The trigger task's configuration at the release.
        header: What travels with the message, see :meth:`Controller.header`.
        delay: In how many milliseconds it may run.
        ends: Whether it is a gate that will not run, and what is sent is the news of that,
            for those who wait for its result.
    """

    manager: Controller
    instance: TaskInstance
    config: TaskConfig
    header: dict[str, Any] = field(default_factory=dict)
    delay: int = 0
    ends: bool = False

    def confirm_write(self) -> Write:
        """Return what notes that the message was sent, unless its instance runs already."""
        return self._note(self.manager.storage.settings.redeliver_after)

    def refuse_write(self) -> Write:
        """Return what notes that the broker does not take the message, though it is up."""
        return self._note(self.manager.storage.settings.dispatch_grace)

    def _note(self, seconds: float) -> Write:
        record = self.instance.record
        # Later each time: what nobody takes is mostly in a long queue, or a misconfiguration.
        wait = int(seconds * 2 ** min(record.sends, MOST_DOUBLINGS) * 1000) + self.delay
        return Write(
            record.name,
            str(self.header['incarnation']),
            guards=[
                {
                    **({'loss': ENDING, 'token': ''} if self.ends else {}),
                    'status': record.status.value,
                    'task_id': record.task_id,
                    'attempt': record.attempt,
                    'sends': record.sends,
                }
            ],
            changes={'sends': record.sends + 1},
            due=StorageTime(wait),
        )


class Controller:
    """Controls one session; the base of all trigger managers.

    Args:
        storage: The session's storage backend.
    """

    #: Whether ``sessionFinalized`` is fired when nothing that counts is unresolved.
    finalizing: ClassVar[bool] = False

    #: The registry key of the runner for tasks without ``using``; ``None``: the setting
    #: ``triggers_runner``.
    default_task_runner_name: ClassVar[str | None] = None

    def __init__(self, storage: StorageBackend):
        self.storage = storage

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.storage!r}>'

    @property
    def uid(self) -> str:
        """The session's uid."""
        return self.storage.uid

    @property
    def key(self) -> str:
        """The registry key of this manager's class.

        Raises:
            TriggersError: It has none, so that no worker could find it.
        """
        key = _key_of(type(self))
        if key is None:
            raise TriggersError(
                f'{type(self).__qualname__} is not registered, so workers could not serve its '
                "sessions: put @trigger_managers.register('<key>') on it, or offer it in the "
                "entry point group 'celery_triggers.managers'"
            )
        return key

    # ------------------------------------------------------------------- hooks

    def _post_fire(self, trigger_name: str, tasks_scheduled: list[TaskInstance]) -> None:
        """Called after a firing was applied and what it released was sent.

        Also for cascades and outcomes, in the process that made the change, at most
        once. An exception is logged and undoes nothing.
        """

    def _post_replay(self, task_instance: TaskInstance) -> None:
        """Called after an instance was replayed, by hand or by its own code, with the new one."""

    def _post_skip(self, task_instance: TaskInstance, cascade: bool) -> None:
        """Called after an instance was skipped, by hand or by its own code."""

    def _hook(self, name: str, *args: Any) -> None:
        try:
            getattr(self, name)(*args)
        except Exception:
            # Documented: hooks run after the commit and undo nothing.
            logger.exception('hook %s of session %r failed', name, self.uid)

    def _serving(self, key: str) -> Controller:
        """Return the manager whose key the session stores; mostly this one."""
        if key == _key_of(type(self)):
            return self
        manager: Controller = trigger_managers.get(key, self.storage)
        return manager

    # ----------------------------------------------------------------- changes

    def prepare(
        self,
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
        self.storage.application.check_storage(self.storage)
        return Change(
            self.storage,
            planner,
            decide,
            manager=self.key,
            finalizing=_is_finalizing,
            event_id=event_id,
            identity=identity,
        )

    def change(self, planner: plans.Planner, decide: Callable[[Step], T]) -> Outcome[T]:
        """Make a change of the session, then send what it released and call the hooks."""
        outcome = self.prepare(planner, decide).make()
        self.follow_up(outcome)
        return outcome

    def cancel_firing(self, event_id: str) -> bool:
        """Take back a delayed firing; tell whether it had not been applied yet.

        Its event id stays taken: a repeat does nothing.

        Raises:
            StorageUnavailable: The storage did not answer; calling again is safe.
        """
        return bool(self.change_delayed(event_id, lambda step: step.cancel_delayed(event_id)))

    def change_delayed(self, event_id: str, decide: Callable[[Step], bool]) -> bool | None:
        """Make a change about a delayed firing, in the session that has it now.

        Args:
            decide: Tells whether it has done something.

        Returns:
            What it told; ``None`` if there is no such firing.
        """
        found = self.storage.read(Plan(delayed=frozenset({event_id}))).session
        delayed = found.delayed.get(event_id)
        if delayed is None:
            return None
        incarnation = found.head.incarnation

        def decide_there(step: Step) -> bool:
            return step.session.head.incarnation == incarnation and decide(step)

        outcome = self.change(plans.delayed_firing(event_id, delayed.trigger), decide_there)
        # Without a value this very change was found to have been made.
        return outcome.value is not False

    def follow_up(self, outcome: Outcome[T]) -> None:
        """Send what a change released and call the hooks, unless an earlier call did so."""
        follow_up_all([(self, outcome)])

    def _released_by(self, outcome: Outcome[Any]) -> list[Release]:
        draft = outcome.draft
        if draft is None:
            return self._released_under(outcome.record.released)
        incarnation = draft.session.head.incarnation
        sent = [self.storage.wrap(draft.session, draft.touched[name]) for name in draft.to_send]
        ended = [self.storage.wrap(draft.session, draft.touched[name]) for name in draft.to_end]
        return [
            *self._releases(sent, incarnation, draft.now), *self._endings(ended, incarnation)
        ]

    def _released_under(self, names: Sequence[str]) -> list[Release]:
        """Return what a commit released whose answer was lost; only names are left of it."""
        if not names:
            return []
        try:
            found = self.storage.read(Plan(instances=frozenset(names)))
        except StorageUnavailable as exc:
            # What was fired is committed, and each of them has a due date.
            logger.warning('%s of session %r are sent later: %s', names, self.uid, exc)
            return []
        session = found.session
        wrapped = [
            self.storage.wrap(session, session.instances[name])
            for name in names
            if name in session.instances
        ]
        # Those that have to wait are left to their due dates.
        ready = [instance for instance in wrapped if instance.record.eta <= found.now]
        return self._releases(ready, session.head.incarnation, found.now)

    def _call_hooks(self, draft: Draft) -> None:
        for stopped in draft.stopped:
            logger.error('session %r: %s', self.uid, stopped)
        for firing in draft.records:
            scheduled = [
                self.storage.wrap(draft.session, draft.touched[name]) for name in firing.released
            ]
            self._hook('_post_fire', firing.trigger, scheduled)
        for name in draft.replayed:
            self._hook('_post_replay', self.storage.wrap(draft.session, draft.touched[name]))
        for name, cascade in draft.skipped:
            instance = self.storage.wrap(draft.session, draft.touched[name])
            self._hook('_post_skip', instance, cascade)

    def dispatch(
        self, instances: Sequence[TaskInstance], incarnation: str, now: int
    ) -> int:
        """Hand instances to their task runners, those of them that are scheduled.

        Args:
            now: The storage's time, in milliseconds.

        Returns:
            How many were taken; the others are sent when their due dates come.
        """
        releases = self._releases(instances, incarnation, now)
        return self.storage.application.dispatch(releases) if releases else 0

    def dispatch_endings(self, gates: Sequence[TaskInstance], incarnation: str) -> int:
        """Have those told who wait for the results of gates that will not run."""
        endings = self._endings(gates, incarnation)
        return self.storage.application.dispatch(endings) if endings else 0

    def _endings(self, gates: Sequence[TaskInstance], incarnation: str) -> list[Release]:
        return [
            Release(self, gate, gate.config, self.header(gate, incarnation), ends=True)
            for gate in gates
            if gate.config is not None and gate.record.is_ending
        ]

    def _releases(
        self, instances: Sequence[TaskInstance], incarnation: str, now: int
    ) -> list[Release]:
        return [
            Release(
                self, instance, instance.config, self.header(instance, incarnation),
                delay=max(0, instance.record.eta - now),
            )
            for instance in instances
            if instance.config is not None and instance.status is Status.SCHEDULED
        ]

    def header(self, instance: TaskInstance, incarnation: str) -> dict[str, Any]:
        """Return what travels in a released message's header ``triggers``.

        Names and keys alone: ``uid``, ``incarnation``, ``instance``, ``task_id``,
        ``attempt``, ``manager`` and ``storage``; ``place`` where workers would else look for
        the session elsewhere; ``depth`` for what was replayed; ``gate`` for that of a gate.
        """
        header: dict[str, Any] = {
            'uid': self.uid,
            'incarnation': incarnation,
            'instance': instance.name,
            'task_id': instance.task_id,
            'attempt': instance.attempt,
            'manager': self.key,
            'storage': self.storage.key,
        }
        if self.storage.elsewhere:
            header['place'] = self.storage.elsewhere
        if instance.depth:
            header['depth'] = instance.depth
        if instance.record.gate is not None:
            header['gate'] = True
        return header


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
        (manager._serving(outcome.manager), outcome)
        for manager, outcome in ended
        if not outcome.duplicate
    ]
    releases = [
        release for manager, outcome in fresh for release in manager._released_by(outcome)
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
            manager._call_hooks(outcome.draft)
    if error is not None:
        raise error


_keys: dict[type, str | None] = {}


def _key_of(class_: type) -> str | None:
    if class_ not in _keys or _keys[class_] is None:
        _keys[class_] = trigger_managers.key_of(class_)
    return _keys[class_]


def _is_finalizing(key: str) -> bool:
    return bool(trigger_managers.get_class(key).finalizing)
