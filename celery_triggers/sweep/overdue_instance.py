"""What is done about an instance that is overdue: it expires, is sent, repaired, or lost."""

from __future__ import annotations

import logging
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.instances import HANDED_TO_GATE, Instance
from celery_triggers.engine.session import Plan, Session
from celery_triggers.engine.step import Step
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import ClaimLost
from celery_triggers.manager import TriggerManager
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.facts import exception_facts, lost_worker
from celery_triggers.manager.follow_up import make_change
from celery_triggers.manager.release import (
    MOST_DOUBLINGS,
    dispatch,
    dispatch_endings,
    header_of,
    serving,
)
from celery_triggers.storages.records import Due, StorageTime, Write
from celery_triggers.wiring import StoredOutcome

__all__ = ['OverdueInstance']

logger = logging.getLogger(__name__)

#: Failures that say that a run was lost, not how it ended.
_OF_LOST_RUNS = frozenset({'WorkerLostError', ClaimLost.__name__})


class OverdueInstance:
    """What is done about one overdue instance; methods return the report's word for it."""

    def __init__(self, manager: TriggerManager, due: Due):
        self.manager = manager
        self.due = due
        self.settings = manager.storage.settings
        self.application = manager.storage.application

    def see_to(self) -> str:
        """Do it; return the report's word for what was done."""
        found = self.manager.storage.read(Plan(instances=frozenset({self.due.name})))
        self.now, self.session = found.now, found.session
        instance = self.session.instance(self.due.name)
        if instance is None:
            return self._forget(self.session, None)
        self.instance = instance
        if instance.status is Status.SCHEDULED:
            return self._scheduled()
        if instance.status is Status.RUNNING:
            return self._running()
        if instance.status is Status.UNSTARTED:
            return self._unstarted()
        if instance.is_ending:
            return self._ending()
        return self._forget(self.session, instance)

    # --------------------------------------------------------------- unstarted

    def _unstarted(self) -> str:
        config = self.session.config_of(self.instance)
        if not 0 < self.instance.deadline(config) <= self.now:
            return self._wait_on(config)

        def decide(step: Step) -> str:
            instance = self._same(step)
            return 'expired' if instance is not None and step.expire(instance) else 'postponed'

        outcome = make_change(self.manager, plans.outcome(self.instance.name), decide)
        # Without a value this very change was found to have been made.
        return outcome.value or 'expired'

    def _wait_on(self, config: TaskConfig | None) -> str:
        """Leave what waits alone; store the state of a gate's result again, which expires."""
        refresh = self.settings.limits.gate_refresh
        if refresh and self.instance.shows_that_it_waits:
            self.application.show_waiting(
                self.instance.task_id, self.manager.uid, self.instance.name
            )
        due = self.instance.next_look(config, self.now, refresh)
        return self._postpone(due) if due else self._forget(self.session, self.instance)

    def _ending(self) -> str:
        """Tell those who wait for a gate's result that it has ended."""
        if self.instance.lease > self.now:
            return self._postpone(self.instance.lease)
        if self.instance.sends >= self.settings.max_deliveries:
            logger.error(
                'the end of the gate %s of session %r could not be told: its message was sent '
                '%d times', self.instance.name, self.manager.uid, self.instance.sends,
            )
            self._write({'loss': '', 'token': '', 'lease': 0}, due=0)
            return 'failed'
        if self.instance.token:
            # Whoever was telling them is gone.
            self._write({'token': '', 'lease': 0}, due=StorageTime())
            return 'postponed'
        head = self.session.head
        wrapped = self.manager.storage.wrap(self.session, self.instance)
        served = serving(self.manager, head.manager)
        return 'sent' if dispatch_endings(served, [wrapped], head.incarnation) else 'unsent'

    # --------------------------------------------------------------- scheduled

    def _scheduled(self) -> str:
        instance = self.instance
        if instance.eta > self.now + self.settings.limits.dispatch_grace:
            return self._postpone(instance.eta)
        config = self.session.config_of(instance)
        if config is None:
            return self._fail('cannot be dispatched', 'the session no longer has its trigger task')
        claims = self.application.makes_claims(instance.message.get('task', config.celery_task))
        if instance.sends and not claims:
            # Sent again it might run twice. Whoever does not know the task leaves it to others.
            return self._repair() or self._postpone(self._later() if claims is False else None)
        if instance.sends >= self.settings.max_deliveries:
            return self._fail(
                'not delivered',
                f'no worker claimed it though its message was sent {instance.sends} times',
            )
        wrapped = self.manager.storage.wrap(self.session, instance)
        head = self.session.head
        served = serving(self.manager, head.manager)
        sent = dispatch(served, [wrapped], head.incarnation, self.now)
        return 'sent' if sent else 'unsent'

    def _later(self) -> int:
        return self.now + int(self.settings.redeliver_after * 1000)

    # ----------------------------------------------------------------- running

    def _running(self) -> str:
        instance = self.instance
        if instance.lease > self.now:
            return self._postpone(instance.lease)
        if not self.due.calm and not instance.spared:
            return self._spare()
        repaired = self._repair()
        if repaired is None and instance.is_handed_over:
            return self._wait_for_replacement()
        return repaired or self._lose()

    def _wait_for_replacement(self) -> str:
        """Wait longer each time for a task that took another's place, and is in some queue."""
        instance = self.instance
        at_gate = instance.loss.startswith(HANDED_TO_GATE)
        if instance.sends >= self.settings.max_deliveries and not at_gate:
            return self._lose()
        seconds = self.settings.redeliver_after * 2 ** min(instance.sends, MOST_DOUBLINGS)
        lease = StorageTime(int(seconds * 1000))
        self._write({'lease': lease, 'sends': instance.sends + 1}, due=lease)
        return 'postponed'

    def _spare(self) -> str:
        """Extend the lease once: while everything was down nobody could renew it."""
        lease = StorageTime(int(self.settings.lease * 1000))
        self._write({'lease': lease, 'spared': 1}, due=lease)
        return 'spared'

    def _lose(self) -> str:
        """Take the instance back from a worker that did not renew its lease."""
        token = self.instance.token
        message = 'the worker that ran it did not renew its lease'

        def decide(step: Step) -> str:
            instance = self._same(step)
            # Its worker may have been heard of just now.
            if instance is None or instance.token != token or instance.lease > step.now:
                return 'postponed'
            step.lose(instance, lost_worker(message), untold=True)
            return {
                Status.SCHEDULED: 'again', Status.REPLAYED: 'replayed',
            }.get(instance.status, 'failed')

        outcome = make_change(self.manager, plans.outcome(self.instance.name), decide)
        what = outcome.value or 'postponed'
        if what != 'postponed':
            logger.warning(
                '%s of session %r: %s; %s', self.instance.name, self.manager.uid, message,
                {'again': 'it is run again', 'replayed': 'it is replayed'}.get(what, 'it fails'),
            )
        return what

    def _same(self, step: Step) -> Instance | None:
        """Return the instance if it is still the one that was due."""
        instance = step.session.instance(self.instance.name)
        if (
            instance is None
            or step.session.head.incarnation != self.session.head.incarnation
            or (instance.status, instance.task_id, instance.attempt)
            != (self.instance.status, self.instance.task_id, self.instance.attempt)
        ):
            return None
        return instance

    # ----------------------------------------------------------------- helpers

    def _repair(self) -> str | None:
        """Take the outcome from the result backend, if it has one that counts."""
        stored = self.application.stored_outcome(self.instance.task_id)
        if stored is None:
            return None
        delivery = self._delivery()
        if stored.state == 'SUCCESS':
            finished = delivery.finish(stored.result, untold=True)
            return 'repaired' if finished else None
        if not self._is_newer(stored):
            return None
        if stored.state == 'REVOKED':
            return 'repaired' if delivery.revoke('revoked', untold=True) else None
        facts = exception_facts(stored.result)
        if facts['type'] in _OF_LOST_RUNS:
            return None
        # Celery stores a failure, too, before it tells the chord.
        in_chord = self.instance.gate is not None and self.instance.gate.in_chord
        return 'repaired' if delivery.fail('raised', facts, untold=in_chord) else None

    def _is_newer(self, stored: StoredOutcome) -> bool:
        """Tell whether a failure is that of the present claim, not of an earlier run."""
        since = self.instance.claimed or self.instance.changed
        return stored.at is not None and stored.at >= since

    def _fail(self, reason: str, message: str) -> str:
        facts = {**exception_facts(None), 'message': message}
        failed = self._delivery().fail(reason, facts, untold=True)
        return 'failed' if failed else 'postponed'

    def _delivery(self) -> Delivery:
        wrapped = self.manager.storage.wrap(self.session, self.instance)
        head = self.session.head
        header = header_of(serving(self.manager, head.manager), wrapped, head.incarnation)
        return Delivery(self.manager, header, self.instance.token, by_sweep=True)

    def _postpone(self, at: int | None) -> str:
        """Move the due date to what it should be; ``None`` leaves it where the sweep put it."""
        if at is not None:
            self._write({}, due=at)
        return 'postponed'

    def _write(self, changes: dict[str, Any], due: int | StorageTime) -> None:
        instance = self.instance
        self.manager.storage.write(
            Write(
                instance.name,
                self.session.head.incarnation,
                guards=[
                    {
                        'status': instance.status.value,
                        'task_id': instance.task_id,
                        'attempt': instance.attempt,
                        'token': instance.token,
                        'lease': instance.lease,
                    }
                ],
                changes=changes,
                due=due,
            )
        )

    def _forget(self, session: Session, instance: Instance | None) -> str:
        """Remove a date that is left over."""
        guards = [{'rev': instance.rev}] if instance is not None else []
        self.manager.storage.write(
            Write(self.due.name, session.head.incarnation, guards, {}, due=0)
        )
        return 'postponed'
