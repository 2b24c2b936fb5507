"""Trigger managers: the controllers of one session."""

from __future__ import annotations

import difflib
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from celery_triggers.controller import Release
from celery_triggers.engine import plans
from celery_triggers.engine.configuration import MOST_SECONDS, Configuration, TaskConfig
from celery_triggers.engine.explain import Explanation, explain
from celery_triggers.engine.names import SESSION_FINALIZED, check_trigger, plain, problem_with
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    CascadeLimitExceeded,
    ClaimLost,
    InvalidConfiguration,
    InvalidFiring,
    UnheardTrigger,
    UnknownKey,
)
from celery_triggers.firing import Firing, ReadyFiring, Run
from celery_triggers.operations import Operations
from celery_triggers.registry import task_runners, trigger_managers
from celery_triggers.storages.view import TaskInstance

__all__ = [
    'Explanation',
    'FinalizingTriggerManager',
    'Firing',
    'Release',
    'TriggerManager',
    'trigger_managers',
]

logger = logging.getLogger(__name__)


@trigger_managers.register('default')
class TriggerManager(Operations):
    """Fires triggers into a session and looks after its instances.

    Args:
        storage: The session's storage backend.
    """

    # ------------------------------------------------------------------ firing

    def fire(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> Firing:
        """Fire a trigger: apply it whole, then send what it released.

        Args:
            trigger_name: Any non-empty string but the name of an outcome.
            trigger_kwargs: A mapping that ``triggers_serializer`` can take.
            event_id: The application's id for this event; the same id in the same
                session is applied once, and a repeat answers what the first one did.
            countdown: In how many seconds it is to be applied. It is accepted now, which
                takes the event id, and stored until then; see :meth:`.Firing.cancel`.
            eta: The same as an aware datetime.

        Raises:
            InvalidFiring: The input was refused; nothing changed.
            EventConflict: The event id stands for another trigger or other kwargs.
            StorageUnavailable: The storage did not answer; repeating the call with the
                error's ``event_id`` is safe.
        """
        return self.ready(
            trigger_name, trigger_kwargs, event_id=event_id, countdown=countdown, eta=eta
        ).make()

    def ready(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        run: Run | None = None,
    ) -> ReadyFiring:
        """Check a firing, with the arguments of :meth:`fire`, and change nothing yet.

        Args:
            run: The run that fires it, which must still have its claim then.
        """
        trigger = check_trigger(self.uid, trigger_name)
        kwargs = self.checked_kwargs(trigger, trigger_kwargs)
        event_id = self._checked_event_id(trigger, event_id)
        due_at = self._checked_delay(trigger, countdown, eta)
        if due_at is not None and event_id is None:
            # It has to be known until it is applied, however long that takes.
            event_id = secrets.token_hex(12)
        self._check_runner()

        def decide(step: Step) -> None:
            depth = 0 if run is None else self._depth_in(step, run, trigger)
            # The session's own manager counts, whichever class this firing came through.
            if trigger == SESSION_FINALIZED and step.finalizing:
                raise InvalidFiring(
                    f'{trigger!r} is fired by the finalizing manager, never by hand',
                    uid=self.uid, trigger=trigger,
                )
            session = step.session
            if not session.configuration.listeners(trigger) and not session.gates_waiting_for(
                trigger
            ):
                self._unheard(step.session.configuration, trigger)
            due = due_at(step.now) if due_at is not None else 0
            if event_id is not None and due > step.now:
                step.delay(event_id, trigger, kwargs, due)
            else:
                step.fire(trigger, kwargs, event_id=event_id, depth=depth)

        planner = plans.firing(trigger) if run is None else plans.firing_of(run.instance, trigger)
        change = self.prepare(planner, decide, event_id=event_id, identity=(trigger, kwargs))
        return ReadyFiring(self, trigger, kwargs, change)

    def _depth_in(self, step: Step, run: Run, trigger: str) -> int:
        """Return how many cascades in a row lead to what a run fires.

        Raises:
            ClaimLost: The run no longer is what its instance stands for.
            CascadeLimitExceeded: The run fires its way round a loop.
        """
        instance = step.session.instance(run.instance)
        why = None
        if step.session.head.incarnation != run.incarnation or instance is None:
            why = 'its session was deleted'
        elif instance.task_id != run.task_id or instance.attempt != run.attempt:
            why = 'its attempt is over'
        elif run.token and (instance.status, instance.token) != (Status.RUNNING, run.token):
            why = f'its claim is gone, the instance is {instance.status}'
        if why is not None:
            raise ClaimLost(
                f'{run.instance} of session {self.uid!r} cannot fire {trigger!r} any more: {why}',
                uid=self.uid, trigger=trigger, instance=run.instance,
            )
        assert instance is not None
        most = step.limits.max_cascade
        if instance.cascade >= most and step.session.configuration.listeners(trigger):
            raise CascadeLimitExceeded(
                f'{run.instance} of session {self.uid!r} fires {trigger!r} after '
                f'{instance.cascade} cascades in a row, as many as triggers_max_cascade allows',
                uid=self.uid, trigger=trigger, limit=most,
            )
        return instance.cascade + 1

    def start(self, until: Mapping[str, datetime] | None = None) -> None:
        """Begin the session: it exists, and its deadlines count from now. Nothing is fired.

        A session that has begun goes on as it was.

        Args:
            until: Deadlines of this session's own, ``{trigger task: aware datetime}``, of
                what has not been released; also for trigger tasks that have no ``within``.

        Raises:
            InvalidConfiguration: The session has no such trigger task.
            TypeError: A deadline is no aware datetime.
        """
        deadlines = {name: _deadline(name, at) for name, at in (until or {}).items()}

        def decide(step: Step) -> None:
            unknown = set(deadlines).difference(step.session.configuration)
            if unknown:
                raise self._no_task(step.session.configuration, *sorted(unknown))
            step.start(deadlines)

        self.change(plans.whole if deadlines else plans.head_alone, decide)

    def _checked_event_id(self, trigger: str, event_id: Any) -> str | None:
        if event_id is None:
            return None
        problem = problem_with(event_id)
        if problem:
            raise InvalidFiring(
                f'an event id {problem}: {event_id!r}', uid=self.uid, trigger=trigger
            )
        return plain(event_id)

    def _checked_delay(
        self, trigger: str, countdown: Any, eta: Any
    ) -> Callable[[int], int] | None:
        """Return what tells when a firing is due, given the storage's time."""
        problem = None
        if countdown is not None and eta is not None:
            problem = 'has a countdown or an eta, not both'
        elif countdown is not None:
            number = isinstance(countdown, (int, float)) and not isinstance(countdown, bool)
            if number and countdown <= MOST_SECONDS:
                return lambda now: now + int(countdown * 1000)
            problem = f'has a countdown of seconds up to {MOST_SECONDS:.0e}, not {countdown!r}'
        elif eta is not None:
            due = _milliseconds(eta)
            if due is not None:
                return lambda _: due
            problem = f'has an aware datetime as its eta, not {eta!r}'
        if problem is not None:
            raise InvalidFiring(f'a firing {problem}', uid=self.uid, trigger=trigger)
        return None

    def _check_runner(self) -> None:
        runner = self.default_task_runner_name or self.storage.settings.runner
        if runner not in task_runners:
            raise UnknownKey('task runner', runner, task_runners.known())

    def _unheard(self, configuration: Configuration, trigger: str) -> None:
        application = self.storage.application
        reaction = self.storage.settings.unheard
        if reaction == 'ignore':
            return
        if application.configuration_for(self.uid).listeners(trigger):
            if not configuration:
                _warn_once(
                    trigger,
                    f'session {self.uid!r} began in a process that knew no trigger task for '
                    f'it, so nobody in it listens to {trigger!r}; import the modules with '
                    'trigger tasks wherever triggers are fired, and give this session its '
                    'trigger tasks with update_configuration(..., apply_past=True)',
                )
            return
        names = sorted({name for task in configuration.values() for name in task.triggers})
        near = difflib.get_close_matches(trigger, names, n=1)
        message = (
            f'no trigger task of session {self.uid!r} listens to {trigger!r}; they listen '
            f'to: {", ".join(names) or "nothing, it has no trigger task"}'
            + (f'; did you mean {near[0]!r}?' if near else '')
        )
        if reaction == 'raise':
            raise UnheardTrigger(message, uid=self.uid, trigger=trigger)
        _warn_once(trigger, message)

    # ----------------------------------------------------------- configuration

    def update_configuration(
        self, configuration: Mapping[str, Any], apply_past: bool = False
    ) -> None:
        """Add or replace trigger tasks of this session alone.

        Args:
            configuration: ``{name: directives}``.
            apply_past: Whether firings that were applied before reach new trigger tasks
                and waiting instances.

        Raises:
            InvalidConfiguration: It was refused whole; nothing changed.
        """
        changes = Configuration.parse(configuration)
        check_runners(changes)

        def decide(step: Step) -> None:
            updated = step.session.configuration.updated(changes)
            step.reconfigure(updated, apply_past=apply_past, named=changes)

        self.change(plans.whole, decide)
        changes.warn_about_cycles()

    def remove_tasks(self, names: Iterable[str]) -> None:
        """Take trigger tasks out of this session; their waiting instances are abandoned.

        Raises:
            InvalidConfiguration: The session has no such trigger task; nothing changed.
        """
        unwanted = {names} if isinstance(names, str) else set(names)

        def decide(step: Step) -> None:
            unknown = unwanted - set(step.session.configuration)
            if unknown:
                raise self._no_task(step.session.configuration, *sorted(unknown))
            step.reconfigure(step.session.configuration.without(unwanted), apply_past=False)

        self.change(plans.whole, decide)

    def cancel(self, reason: str | None = None) -> None:
        """Abandon what waits, now and for as long as the session lives."""
        self.change(plans.whole, lambda step: step.cancel(reason or 'by hand'))

    # ------------------------------------------------------------------ asking

    def get_unresolved_tasks(self) -> list[TaskConfig]:
        """Return the trigger tasks that have no instance, or an unresolved one."""
        return self.storage.get_unresolved_tasks()

    def get_unresolved_instances(self) -> list[TaskInstance]:
        """Return the instances that are not resolved."""
        return self.storage.get_unresolved_instances()

    def explain(self, task: str | None = None) -> list[Explanation]:
        """Say of each instance, or of those of one trigger task, why it stands where it does.

        Args:
            task: The name of a trigger task or of a gate.

        Raises:
            InvalidConfiguration: The session has no trigger task of that name, and no gate.
        """
        session = self.storage.load()
        gates = {i.task for i in session.instances.values() if i.gate is not None}
        names = sorted({*session.configuration, *gates})
        if task is not None and task not in names:
            raise self._no_task(names, task)
        return [
            explanation
            for name in names
            if task in (None, name)
            for explanation in explain(
                session.configuration.get(name), session.instances_of(name)
            )
        ]


@trigger_managers.register('finalizing')
class FinalizingTriggerManager(TriggerManager):
    """Fires ``sessionFinalized`` once, when nothing that counts is unresolved."""

    finalizing = True


def _deadline(task: str, at: Any) -> int:
    deadline = _milliseconds(at)
    if deadline is None:
        raise TypeError(
            f'the deadline of {task!r} is an aware datetime, such as '
            f'datetime.now(timezone.utc) + timedelta(hours=1), not {at!r}'
        )
    return deadline


def _milliseconds(at: Any) -> int | None:
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


def check_runners(configuration: Configuration) -> None:
    """Refuse a configuration that names a task runner which is not registered."""
    for task in configuration.values():
        if task.using is not None and task.using not in task_runners:
            raise InvalidConfiguration(
                str(UnknownKey('task runner', task.using, task_runners.known())),
                task=task.name,
                directive='using',
            )
