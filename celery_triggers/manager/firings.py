"""The part of a trigger manager that fires: at once, later, or with a transaction."""

from __future__ import annotations

import difflib
import logging
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from itertools import count
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.configuration import MOST_SECONDS, Configuration
from celery_triggers.engine.names import SESSION_FINALIZED, check_trigger, plain, problem_with
from celery_triggers.engine.session import Plan, Session
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import (
    CascadeLimitExceeded,
    ClaimLost,
    InvalidFiring,
    TriggersError,
    UnheardTrigger,
    UnknownKey,
)
from celery_triggers.manager.firing import Delay, Firing, ReadyFiring, Run
from celery_triggers.manager.operations import Operations
from celery_triggers.registry import task_runners
from celery_triggers.storages.records import StoredFiring

__all__ = ['Firings', 'milliseconds']

logger = logging.getLogger(__name__)


class Firings(Operations):
    """Fires triggers into a session."""

    def fire(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        connection: Any = None,
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
            connection: A ``Connection`` or ``Session`` of SQLAlchemy's to the database of the
                storage ``sql``: the firing becomes part of its transaction, and is applied
                once that is committed. With the storage ``django``, a firing inside
                ``transaction.atomic()`` is so without being asked.

        Returns:
            What came of it; within a transaction that is still to come (``pending``).

        Raises:
            InvalidFiring: The input was refused; nothing changed.
            EventConflict: The event id stands for another trigger or other kwargs. Within a
                transaction that is found out after its commit, and logged.
            StorageUnavailable: The storage did not answer; repeating the call with the
                error's ``event_id`` is safe.
        """
        return self.ready(
            trigger_name, trigger_kwargs, event_id=event_id, countdown=countdown, eta=eta,
            connection=connection,
        ).make()

    def ready(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        connection: Any = None,
        run: Run | None = None,
    ) -> ReadyFiring:
        """Check a firing, with the arguments of :meth:`fire`, and change nothing yet.

        Args:
            run: The run that fires it, which must still have its claim then.
        """
        trigger = check_trigger(self.uid, trigger_name)
        kwargs = self.checked_kwargs(trigger, trigger_kwargs)
        event_id = self._checked_event_id(trigger, event_id)
        delay = self._checked_delay(trigger, countdown, eta)
        self._check_runner()
        if delay is not None and event_id is None:
            # It has to be known until it is applied, however long that takes.
            event_id = secrets.token_hex(12)
        ready = self._ready(trigger, kwargs, event_id, delay, run)
        if self.storage.takes_part(connection):
            ready.store = lambda: self._store(trigger, kwargs, event_id, delay, run, connection)
        return ready

    def _ready(
        self,
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
            known = depth if run is None else self._depth_in(session, run, trigger)
            # The session's own manager counts, whichever class this firing came through.
            if trigger == SESSION_FINALIZED and step.cascade.finalizing:
                raise InvalidFiring(
                    f'{trigger!r} is fired by the finalizing manager, never by hand',
                    uid=self.uid, trigger=trigger,
                )
            if not session.configuration.listeners(trigger) and not session.gates_waiting_for(
                trigger
            ):
                self._unheard(session.configuration, trigger)
            due = delay.due(step.now) if delay is not None else 0
            if event_id is not None and due > step.now:
                step.delay(event_id, trigger, kwargs, due)
            else:
                step.fire(trigger, kwargs, event_id=event_id, depth=known)

        planner = plans.firing(trigger) if run is None else plans.firing_of(run.instance, trigger)
        change = self.prepare(planner, decide, event_id=event_id, identity=(trigger, kwargs))
        return ReadyFiring(self, trigger, kwargs, change)

    def _depth_in(self, session: Session, run: Run, trigger: str) -> int:
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
                f'{run.instance} of session {self.uid!r} cannot fire {trigger!r} any more: {why}',
                uid=self.uid, trigger=trigger, instance=run.instance,
            )
        assert instance is not None
        most = self.storage.settings.limits.max_cascade
        if instance.cascade >= most and session.configuration.listeners(trigger):
            raise CascadeLimitExceeded(
                f'{run.instance} of session {self.uid!r} fires {trigger!r} after '
                f'{instance.cascade} cascades in a row, as many as triggers_max_cascade allows',
                uid=self.uid, trigger=trigger, limit=most,
            )
        return instance.cascade + 1

    # ------------------------------------------------------ within transactions

    def _store(
        self,
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
            depth = self._depth_in(self.storage.read(plan).session, run, trigger)
        id_ = _new_id()
        stored = StoredFiring(
            id_, trigger, kwargs, event_id or id_,
            delay.milliseconds if delay else 0, bool(delay and delay.absolute), depth, self.key,
        )
        now = self.storage.store_firing(stored, connection, lambda: self.apply_stored(id_))
        return Firing.stored(self, stored, now, delay)

    def apply_stored(self, id_: str) -> bool:
        """Apply a firing whose transaction was committed; tell whether it is there.

        One that is applied twice at the same time, or again after a crash, counts once: its
        event id sees to that. One that is refused now is logged and forgotten, since its
        transaction is over.

        Raises:
            StorageUnavailable: The storage did not answer; calling again is safe.
        """
        found = self.storage.stored_firing(id_)
        if found is None:
            return False
        at, stored = found
        manager = self._serving(stored.manager)
        assert isinstance(manager, Firings)
        manager._apply(stored, at)
        return True

    def _apply(self, stored: StoredFiring, at: int) -> None:
        delay = None
        if stored.delay:
            delay = Delay(stored.delay if stored.absolute else at + stored.delay, absolute=True)
        ready = self._ready(
            stored.trigger, stored.kwargs, stored.event_id, delay, depth=stored.depth
        )
        outcome = None
        try:
            outcome = ready.change.make()
        except InvalidFiring:
            logger.exception(
                'session %r: the firing of %r (event id %r) is refused now that its transaction '
                'is committed', self.uid, stored.trigger, stored.event_id,
            )
        self.storage.forget_firing(stored.id)
        if outcome is not None:
            self.follow_up(outcome)

    def cancel_stored(self, id_: str, event_id: str) -> bool:
        """Take back a delayed firing that was stored within a transaction.

        Raises:
            TriggersError: The transaction has not been committed.
            StorageUnavailable: The storage did not answer; calling again is safe.
        """
        if not self.apply_stored(id_):
            plan = Plan(events=frozenset({event_id}))
            if event_id not in self.storage.read(plan).session.events:
                raise TriggersError(
                    f'the firing with the event id {event_id!r} of session {self.uid!r} is part of '
                    'a transaction that is not committed: roll that back instead'
                )
        return self.cancel_firing(event_id)

    # ------------------------------------------------------------------ checks

    def _checked_event_id(self, trigger: str, event_id: Any) -> str | None:
        if event_id is None:
            return None
        problem = problem_with(event_id)
        if problem:
            raise InvalidFiring(
                f'an event id {problem}: {event_id!r}', uid=self.uid, trigger=trigger
            )
        return plain(event_id)

    def _checked_delay(self, trigger: str, countdown: Any, eta: Any) -> Delay | None:
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


def milliseconds(at: Any) -> int | None:
    """Return the moment of an aware datetime; ``None`` if it is none."""
    if not isinstance(at, datetime) or at.utcoffset() is None:
        return None
    # 0 stands for no date.
    return max(1, int(at.timestamp() * 1000))


_numbers = count()


def _new_id() -> str:
    """Return the key of a stored firing; later ones of this process come after it."""
    number = next(_numbers) % 0x100000000
    return f'{int(time.time() * 1000):012x}{number:08x}{secrets.token_hex(6)}'


_warned_about: set[str] = set()
_MOST_WARNED_ABOUT = 10_000


def _warn_once(trigger: str, message: str) -> None:
    """Warn about a trigger's name once in this process."""
    if trigger not in _warned_about:
        if len(_warned_about) >= _MOST_WARNED_ABOUT:
            _warned_about.clear()
        _warned_about.add(trigger)
        logger.warning(message)
