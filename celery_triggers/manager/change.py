"""Read, decide, commit: how every change of a session is made.

No lock is held: a step is decided on a slice and committed if the session has not
changed since, else it is decided again on the fresh slice that comes with the refusal.
"""

from __future__ import annotations

import random
import secrets
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.session import EventRecord, NotLoaded, Plan
from celery_triggers.engine.step import Step
from celery_triggers.exceptions import EventConflict, StorageUnavailable
from celery_triggers.storages.base import Question, StorageBackend
from celery_triggers.storages.snapshot import Snapshot

T = TypeVar('T')

#: How many conflicts are answered at once, and then the pauses before further attempts
#: (seconds; each is random up to twice the one before, so that processes that met once
#: do not meet for ever).
AT_ONCE = 1
FIRST_PAUSE = 0.004
MOST_PAUSE = 0.2


def new_task_id() -> str:
    """Return a task id as Celery makes them."""
    return str(uuid.uuid4())


@dataclass(slots=True)
class Outcome(Generic[T]):
    """What came of a change.

    Attributes:
        event_id: The id under which the change is known.
        record: What it did, also if an earlier attempt or call did it.
        value: What the decision returned; ``None`` if this call decided nothing.
        draft: What was committed; ``None`` if this call committed nothing.
        duplicate: Whether an earlier call with the same event id had done it.
        manager: The registry key of the session's manager.
    """

    event_id: str
    record: EventRecord
    value: T | None
    draft: Draft | None
    duplicate: bool
    manager: str


Asking = Generator[Question, 'Snapshot | None', T]


class Change(Generic[T]):
    """One change of one session.

    Args:
        storage: The session's storage.
        planner: Returns what must be read, given the session's configuration.
        decide: Makes the change on a step and returns a value; may be called again.
        manager: The registry key of the manager, for a session that is new.
        finalizing: Tells whether the manager with a key fires ``sessionFinalized``.
        event_id: The application's id for this change, or ``None``.
        identity: What the event id stands for, ``(trigger, kwargs)``.
    """

    def __init__(
        self,
        storage: StorageBackend,
        planner: Callable[[Configuration, bool], Plan],
        decide: Callable[[Step], T],
        *,
        manager: str,
        finalizing: Callable[[str], bool],
        event_id: str | None = None,
        identity: tuple[str, Any] = ('', None),
    ):
        self.storage = storage
        self.planner = planner
        self.decide = decide
        self.manager = manager
        self.finalizing = finalizing
        self.lasting = event_id is not None
        self.event_id = event_id or secrets.token_hex(12)
        self.call = secrets.token_hex(6)
        self.trigger = identity[0]
        self.digest = storage.codec.digest(*identity)
        self.more = Plan(events=frozenset({self.event_id})) if self.lasting else Plan()

    def make(self) -> Outcome[T]:
        """Make the change.

        Raises:
            EventConflict: The event id stands for something else.
            StorageUnavailable: The storage did not answer.
        """
        steps = self.steps()
        try:
            asked = next(steps)
            while True:
                asked = steps.send(asked.ask())
        except StopIteration as end:
            outcome: Outcome[T] = end.value
            return outcome
        except StorageUnavailable as exc:
            exc.event_id = self.event_id
            raise

    def steps(self) -> Asking[Outcome[T]]:
        """Make the change, but let the caller ask the storage.

        Yields what to ask and takes the answer, so that many changes can share their
        round trips; returns the outcome.
        """
        begins_with = self.storage.application.configuration_for(self.storage.uid)
        configuration = begins_with
        snapshot = yield from self._read(configuration, self.manager)
        attempts = 0
        while True:
            snapshot = yield from self._fitting(snapshot, configuration, begins_with)
            configuration = snapshot.session.configuration
            earlier = self._earlier(snapshot)
            if earlier is not None:
                # This call's own record is that of a commit whose answer was lost.
                return self._outcome(earlier, snapshot, duplicate=earlier.call != self.call)
            step = self._step(snapshot)
            try:
                value = self.decide(step)
            except NotLoaded as need:
                self.more = self.more | need.plan
                snapshot = yield from self._read(configuration, snapshot.session.head.manager)
                continue
            record = EventRecord(
                self.digest, self.trigger, step.now, self.lasting, self.call
            )
            if step.draft.records:
                record.heard_by = step.draft.records[0].heard_by
            if self.event_id in step.session.delayed:
                record.due = step.session.delayed[self.event_id].due
            if not step.draft.changed:
                return self._outcome(record, snapshot, value=value)
            step.draft.remember(self.event_id, record)
            fresh = yield self.storage.committing(snapshot, step.draft)
            if fresh is None:
                return self._outcome(record, snapshot, value=value, draft=step.draft)
            attempts += 1
            snapshot = yield from self._after_conflict(fresh, attempts)

    def _after_conflict(self, fresh: Snapshot, attempts: int) -> Asking[Snapshot]:
        """Return what to decide on next.

        At first that is the slice that came with the refusal. In a session that many
        fire into at once it is soon outdated too: then a pause lets others through, and
        a new slice is read after it.
        """
        if attempts <= AT_ONCE:
            return fresh
        time.sleep(random.uniform(0, min(MOST_PAUSE, FIRST_PAUSE * 2 ** (attempts - AT_ONCE))))
        snapshot = yield from self._read(
            fresh.session.configuration, fresh.session.head.manager
        )
        return snapshot

    def _plan(self, configuration: Configuration, manager: str) -> Plan:
        plan = self.planner(configuration, self.finalizing(manager or self.manager))
        return plan | self.more if self.more != Plan() else plan

    def _read(self, configuration: Configuration, manager: str) -> Asking[Snapshot]:
        # The id also where the application gave it: it may repeat, with the id of the
        # error, a firing without one whose answer was lost.
        plan = self._plan(configuration, manager)
        snapshot = yield self.storage.reading(plan, configuration, self.event_id)
        assert snapshot is not None
        return snapshot

    def _fitting(
        self, snapshot: Snapshot, expected: Configuration, begins_with: Configuration
    ) -> Asking[Snapshot]:
        """Read again if the session's own configuration asks for more than was read.

        Where the session is gone by then another begins, with what all begin with, and not
        with what had been given to the one before.
        """
        while True:
            session = snapshot.session
            if not snapshot.exists:
                if session.configuration is begins_with:
                    return snapshot
                expected = begins_with
            else:
                own_manager = session.head.manager not in ('', self.manager)
                if session.configuration is expected and not own_manager:
                    return snapshot
                expected = session.configuration
                wanted = self._plan(expected, session.head.manager)
                if session.plan.whole or session.plan == wanted:
                    return snapshot
            snapshot = yield from self._read(expected, session.head.manager)

    def _earlier(self, snapshot: Snapshot) -> EventRecord | None:
        record = snapshot.session.events.get(self.event_id)
        if record is not None and self.lasting and record.digest != self.digest:
            raise EventConflict(
                f'event id {self.event_id!r} of session {self.storage.uid!r} stands for a '
                f'firing of {record.trigger!r} with other content; use another id',
                uid=self.storage.uid,
                trigger=self.trigger,
                event_id=self.event_id,
            )
        return record

    def _step(self, snapshot: Snapshot) -> Step:
        session = snapshot.session
        finalizing = self.finalizing(session.head.manager or self.manager)
        step = Step(
            session, snapshot.now, new_task_id, finalizing=finalizing,
            limits=self.storage.settings.limits,
        )
        if not snapshot.exists:
            # There is nothing that was not read.
            session.plan = Plan(whole=True)
            session.head.incarnation = secrets.token_hex(8)
            session.head.manager = self.manager
            session.head.created = snapshot.now
            session.head.digest = session.configuration.digest
            step.draft.new_configuration = session.configuration
        return step

    def _outcome(
        self,
        record: EventRecord,
        snapshot: Snapshot,
        *,
        value: T | None = None,
        draft: Draft | None = None,
        duplicate: bool = False,
    ) -> Outcome[T]:
        manager = snapshot.session.head.manager or self.manager
        return Outcome(self.event_id, record, value, draft, duplicate, manager)


def make_all(changes: Sequence[Change[T]]) -> list[Outcome[T] | Exception]:
    """Make changes of different sessions, which share their round trips.

    Returns:
        For each change its outcome, or what it raised; one that fails holds up no other.
    """
    results: dict[int, Outcome[T] | Exception] = {}
    running = {index: change.steps() for index, change in enumerate(changes)}
    answers: dict[int, Any] = dict.fromkeys(running)
    while running:
        asked: dict[int, Question] = {}
        for index, steps in list(running.items()):
            try:
                asked[index] = _go_on(steps, answers[index])
                continue
            except StopIteration as end:
                results[index] = end.value
            except Exception as exc:  # noqa: BLE001
                # Kept for the caller, who learns of it beside the others' outcomes.
                if isinstance(exc, StorageUnavailable):
                    exc.event_id = changes[index].event_id
                results[index] = exc
            del running[index]
        answers = _ask_all(asked)
    return [results[index] for index in range(len(changes))]


def _go_on(steps: Asking[Any], answer: Snapshot | Exception | None) -> Question:
    return steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)


def _ask_all(asked: dict[int, Question]) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    for kind in {type(question.storage) for question in asked.values()}:
        group = {i: question for i, question in asked.items() if type(question.storage) is kind}
        answers.update(zip(group, kind.ask_many(list(group.values())), strict=True))
    return answers
