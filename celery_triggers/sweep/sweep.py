"""The sweep: one pass over what is overdue, and what is done about each of it.

Every promise has a date by which it should have been kept. Most are kept, and their dates
move or go without anybody looking at them. What is left is seen to here: nowhere else is
a worker judged to be gone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime

from celery_triggers.engine import plans
from celery_triggers.engine.names import event_of_delayed, id_in_inbox
from celery_triggers.engine.session import Plan
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import WITH_DUE_DATE
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager, pending
from celery_triggers.manager.follow_up import make_change
from celery_triggers.manager.pending import DelayedChange
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import Due, Taken, Write
from celery_triggers.storages.view import moment
from celery_triggers.sweep.overdue_instance import OverdueInstance
from celery_triggers.wiring import Application

__all__ = ['Sweep', 'SweepReport']

logger = logging.getLogger(__name__)

#: How many due dates one pass takes.
MOST_AT_ONCE = 1000


@dataclass(slots=True)
class SweepReport:
    """What one pass did.

    Attributes:
        taken: How many due dates had come.
        sent: Messages sent, for the first time or again.
        unsent: Messages that could not be sent; the broker is down.
        repaired: Outcomes that only the result backend knew of.
        again: Instances taken back from lost workers, to be run again.
        replayed: Instances of lost workers that others took the place of.
        failed: Instances that failed: their workers were lost, or no worker took them.
        expired: Instances whose deadlines had passed.
        fired: Delayed firings whose time had come, and those of committed transactions.
        spared: Instances whose leases were extended, since nobody could have renewed them.
        postponed: Those for which it was not time yet after all.
        deleted: Sessions that had expired.
        errors: Those that could not be seen to; they come again.
        more: Whether more is due already.
        next_at: When the next due date comes (UTC), ``None`` if there is none.
    """

    taken: int = 0
    sent: int = 0
    unsent: int = 0
    repaired: int = 0
    again: int = 0
    replayed: int = 0
    failed: int = 0
    expired: int = 0
    fired: int = 0
    spared: int = 0
    postponed: int = 0
    deleted: int = 0
    errors: int = 0
    more: bool = False
    next_at: datetime | None = None

    def __str__(self) -> str:
        counts = (
            f'{getattr(self, name)} {name}'
            for name in self.__slots__
            if name not in ('taken', 'more', 'next_at') and getattr(self, name)
        )
        return f'{self.taken} due: {", ".join(counts) or "nothing to do"}'


@dataclass(slots=True)
class Sweep:
    """A pass over the due dates of one place.

    Args:
        application: Whose sessions are there.
        storage: The class of their storage.
        url: The place.
    """

    application: Application
    storage: type[StorageBackend]
    url: str | None
    report: SweepReport = field(default_factory=SweepReport)

    def run(self, limit: int = MOST_AT_ONCE) -> SweepReport:
        """Take what is due and see to it.

        Raises:
            StorageUnavailable: The storage did not say what is due.
        """
        for due in self.take(limit).entries:
            if not self.see_to(due):
                break
        return self.report

    def take(self, limit: int = MOST_AT_ONCE) -> Taken:
        """Take what is due; nobody else gets the same."""
        settings = self.application.settings.frozen()
        # A lease that was renewed in time outlasts what is shorter than this.
        gap = settings.lease / 2
        taken = self.storage.take_due(
            self.url,
            settings,
            limit=limit,
            push=int(settings.dispatch_grace * 1000),
            gap=int(gap * 1000),
        )
        self.report.taken = len(taken.entries)
        self.report.more = taken.more
        self.report.next_at = moment(taken.next_at) if taken.next_at is not None else None
        return taken

    def see_to(self, due: Due) -> bool:
        """Do what is due; return ``False`` if the storage is down, so that nothing can be done.

        Nothing that is wrong with one of them holds up the others: each comes again.
        """
        try:
            storage = self.storage(due.uid, due.place or self.url, application=self.application)
            manager: TriggerManager = trigger_managers.get('default', storage)
            what = _overdue(manager, due).see_to()
        except StorageUnavailable as exc:
            logger.warning('the sweep stops, what is due comes again: %s', exc)
            self.report.errors += 1
            return False
        except Exception:
            logger.exception('%s of session %r is due and cannot be seen to', due.name, due.uid)
            what = 'errors'
        if what:
            setattr(self.report, what, getattr(self.report, what) + 1)
        return True


def _overdue(
    manager: TriggerManager, due: Due
) -> OverdueInstance | OverdueFiring | CommittedFiring | OldSession:
    id_ = id_in_inbox(due.name)
    if id_ is not None:
        return CommittedFiring(manager, id_)
    event_id = event_of_delayed(due.name)
    if event_id is not None:
        return OverdueFiring(manager, due.name, event_id)
    return OverdueInstance(manager, due) if due.name else OldSession(manager)


class OverdueFiring:
    """What is done about a delayed firing whose time has come."""

    def __init__(self, manager: TriggerManager, name: str, event_id: str):
        self.manager = manager
        self.name = name
        self.event_id = event_id

    def see_to(self) -> str:
        """Apply it; return the report's word for what was done."""
        done = pending.change_delayed(self.manager, self.event_id, self._fire)
        if done is DelayedChange.UNKNOWN:
            # A write to no instance removes the date that is left over.
            self.manager.storage.write(Write(self.name, '', [], {}, due=0))
        return 'fired' if done is DelayedChange.DONE else 'postponed'

    def _fire(self, step: Step) -> bool:
        if step.fire_delayed(self.event_id):
            return True
        again = step.session.delayed_firing(self.event_id)
        if again is not None:
            # A clock was set back: its date is what it was.
            step.delay(self.event_id, again.trigger, again.kwargs, again.due)
        return False


class CommittedFiring:
    """What is done about a firing whose transaction was committed."""

    def __init__(self, manager: TriggerManager, id_: str):
        self.manager = manager
        self.id = id_

    def see_to(self) -> str:
        """Apply it; return the report's word for what was done."""
        return 'fired' if pending.apply_stored(self.manager, self.id) else 'postponed'


class OldSession:
    """What is done about a session whose time is over."""

    def __init__(self, manager: TriggerManager):
        self.manager = manager
        self.storage = manager.storage

    def see_to(self) -> str:
        """Delete it; return the report's word for what was done."""
        found = self.storage.read(Plan(whole=True))
        expires = self.storage.settings.session_expires
        if not found.exists or expires is None:
            # A write to no instance removes the date that stands for the session.
            self.storage.write(Write('', '', [], {}, due=0))
            return 'postponed'
        over = found.session.head.clock + int(expires * 1000) <= found.now
        session = found.session
        alive = (
            instance.status in WITH_DUE_DATE
            or instance.is_ending
            or instance.deadline(session.config_of(instance))
            for instance in session.instances.values()
        )
        if over and not session.head.gates and not session.delayed and not any(alive):
            return 'deleted' if self.storage.delete(found.slice.version) else 'postponed'
        make_change(self.manager, plans.head_alone, _renew)
        return 'postponed'


def _renew(step: Step) -> None:
    """Commit nothing but a new date at which the session may go."""
    draft = step.draft
    draft.changed = draft.session.head.incarnation != '' and draft.new_configuration is None
