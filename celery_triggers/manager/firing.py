"""Firings: ready to be made, made alone or many at a time, and answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from celery_triggers.exceptions import TriggersError
from celery_triggers.manager.change import Change, Outcome, make_all
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.follow_up import follow_up, follow_up_all
from celery_triggers.storages.records import StoredFiring
from celery_triggers.storages.view import moment

__all__ = ['Delay', 'Firing', 'ReadyFiring', 'Run', 'fire_all']

#: How many firings share round trips at most: a bound for what one request holds.
MOST_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Delay:
    """When a firing is due: so many milliseconds later or, if ``absolute``, at that moment."""

    milliseconds: int
    absolute: bool = False

    def due(self, now: int) -> int:
        """Return the moment, given the storage's time."""
        return self.milliseconds if self.absolute else now + self.milliseconds


class _OfSession:
    """Knows how it is taken back, which is no fact about it and is not copied."""

    __slots__ = ('_take_back',)

    def can_be_taken_back_by(self, call: Callable[[], bool]) -> None:
        """Say what :meth:`.Firing.cancel` does while this is pending."""
        object.__setattr__(self, '_take_back', call)


@dataclass(frozen=True, slots=True)
class Firing(_OfSession):
    """What came of a firing.

    Attributes:
        event_id: The application's id, or one that was made up.
        at: When it was applied, by the storage's clock (UTC).
        heard_by: The trigger tasks that it concerned.
        created, released, abandoned: Names of instances, its consequences included.
        duplicate: Whether an earlier firing with this event id had been applied; the
            other fields then tell what that one did.
        pending: Whether it is still to be applied; what it led to is not known then.
        due: When it is applied, for one that is pending; ``None``: when the transaction that
            it is part of is committed.
    """

    uid: str
    trigger: str
    kwargs: dict[str, Any]
    event_id: str
    at: datetime
    heard_by: list[str]
    created: list[str]
    released: list[str]
    abandoned: list[str]
    duplicate: bool = False
    pending: bool = False
    due: datetime | None = None

    def cancel(self) -> bool:
        """Take back a firing that is pending; tell whether that was in time.

        Its event id stays taken. One that was applied cannot be taken back.

        Raises:
            StorageUnavailable: The storage did not answer; calling again is safe.
            TriggersError: This is a copy, which has lost its session; or the transaction that
                it is part of is not committed, and can be rolled back.
        """
        if not self.pending:
            return False
        take_back: Callable[[], bool] | None = getattr(self, '_take_back', None)
        if take_back is None:
            raise TriggersError(
                'this is a copy of what fire() returned; call '
                f'app.triggers.session({self.uid!r}).cancel_firing({self.event_id!r})'
            )
        return take_back()

    @classmethod
    def stored(
        cls, manager: Controller, stored: StoredFiring, now: int, delay: Delay | None
    ) -> Firing:
        """Return what is known of a firing that is part of an open transaction."""
        return cls(
            manager.uid, stored.trigger, stored.kwargs, stored.event_id, moment(now),
            heard_by=[], created=[], released=[], abandoned=[], pending=True,
            due=moment(delay.due(now)) if delay is not None else None,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """The run of an instance that fires something.

    Attributes:
        incarnation: That of the session which released the instance.
        token: The claim under which it runs, ``''`` for a task that makes none.
    """

    instance: str
    task_id: str
    attempt: int
    incarnation: str
    token: str = ''


@dataclass(slots=True)
class ReadyFiring:
    """A firing whose input was checked and which has changed nothing yet.

    Attributes:
        store: Stores it within the application's transaction, if it is to be part of one.
    """

    manager: Controller
    trigger: str
    kwargs: dict[str, Any]
    change: Change[None]
    store: Callable[[], Firing] | None = None

    def make(self) -> Firing:
        """Apply it, send what it released and call the hooks."""
        if self.store is not None:
            return self.store()
        outcome = self.change.make()
        follow_up(self.manager, outcome)
        return self.answer(outcome)

    def answer(self, outcome: Outcome[None]) -> Firing:
        """Return what came of it."""
        record = outcome.record
        firing = Firing(
            self.manager.uid,
            self.trigger,
            self.kwargs,
            outcome.event_id,
            moment(record.at),
            record.heard_by,
            record.created,
            record.released,
            record.abandoned,
            outcome.duplicate,
            bool(record.due),
            moment(record.due) if record.due else None,
        )
        manager: Any = self.manager
        firing.can_be_taken_back_by(lambda: bool(manager.cancel_firing(outcome.event_id)))
        return firing


def fire_all(ready: Sequence[ReadyFiring]) -> list[Firing]:
    """Make firings; those into different sessions share their round trips.

    Firings into the same session are applied in the order given.

    Raises:
        TriggersError: The first of the errors that came; none was begun after it but
            those that shared its round trips. Its attribute ``firings`` has what was made.
    """
    firings: list[Firing | None] = [None] * len(ready)
    if any(firing.store is not None for firing in ready):
        return _make_each(ready, firings)
    queues: dict[str, deque[int]] = {}
    for index, firing in enumerate(ready):
        queues.setdefault(firing.manager.uid, deque()).append(index)
    while queues:
        wave = [queue.popleft() for queue in islice(queues.values(), MOST_AT_ONCE)]
        queues = {uid: queue for uid, queue in queues.items() if queue}
        error = _make_wave(ready, wave, firings)
        if error is not None:
            if isinstance(error, TriggersError):
                error.firings = firings
            raise error
    return [firing for firing in firings if firing is not None]


def _make_each(ready: Sequence[ReadyFiring], firings: list[Firing | None]) -> list[Firing]:
    """Make firings one after the other: those within a transaction wait for nothing."""
    for index, firing in enumerate(ready):
        try:
            firings[index] = firing.make()
        except TriggersError as exc:
            exc.firings = firings
            raise
    return [firing for firing in firings if firing is not None]


def _make_wave(
    ready: Sequence[ReadyFiring], wave: Sequence[int], firings: list[Firing | None]
) -> Exception | None:
    """Make one firing of each of some sessions; return the first error."""
    errors: list[Exception] = []
    applied: list[tuple[Controller, Outcome[None]]] = []
    for index, outcome in zip(wave, make_all([ready[i].change for i in wave]), strict=True):
        if isinstance(outcome, Exception):
            errors.append(outcome)
            continue
        applied.append((ready[index].manager, outcome))
        firings[index] = ready[index].answer(outcome)
    try:
        follow_up_all(applied)
    except Exception as exc:  # noqa: BLE001
        # Raised by an eager task; what the storage said comes first.
        errors.append(exc)
    return errors[0] if errors else None
