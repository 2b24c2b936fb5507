"""Released instances on their way to a task runner, and what travels with their messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.engine.transitions import Status
from celery_triggers.manager.controller import Controller, key_of
from celery_triggers.registry import trigger_managers
from celery_triggers.storages.records import StorageTime, Write
from celery_triggers.storages.view import TaskInstance

__all__ = [
    'MOST_DOUBLINGS', 'Release', 'dispatch', 'dispatch_endings', 'endings', 'header_of', 'releases',
    'serving',
]

#: How often the wait is doubled for a message that nobody takes.
MOST_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Release:
    """A released instance on its way to a task runner.

    Attributes:
        config: The trigger task's configuration at the release.
        header: What travels with the message, see :func:`header_of`.
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


def dispatch(
    manager: Controller, instances: Sequence[TaskInstance], incarnation: str, now: int
) -> int:
    """Hand instances to their task runners, those of them that are scheduled.

    Args:
        now: The storage's time, in milliseconds.

    Returns:
        How many were taken; the others are sent when their due dates come.
    """
    found = releases(manager, instances, incarnation, now)
    return manager.storage.application.dispatch(found) if found else 0


def dispatch_endings(manager: Controller, gates: Sequence[TaskInstance], incarnation: str) -> int:
    """Have those told who wait for the results of gates that will not run."""
    found = endings(manager, gates, incarnation)
    return manager.storage.application.dispatch(found) if found else 0


def endings(manager: Controller, gates: Sequence[TaskInstance], incarnation: str) -> list[Release]:
    """Return the news of gates that will not run, for those who wait for their results."""
    return [
        Release(manager, gate, gate.config, header_of(manager, gate, incarnation), ends=True)
        for gate in gates
        if gate.config is not None and gate.record.is_ending
    ]


def releases(
    manager: Controller, instances: Sequence[TaskInstance], incarnation: str, now: int
) -> list[Release]:
    """Return those of some instances that are scheduled, on their way to task runners."""
    return [
        Release(
            manager, instance, instance.config, header_of(manager, instance, incarnation),
            delay=max(0, instance.record.eta - now),
        )
        for instance in instances
        if instance.config is not None and instance.status is Status.SCHEDULED
    ]


def header_of(manager: Controller, instance: TaskInstance, incarnation: str) -> dict[str, Any]:
    """Return what travels in a released message's header ``triggers``.

    Names and keys alone: ``uid``, ``incarnation``, ``instance``, ``task_id``,
    ``attempt``, ``manager`` and ``storage``; ``place`` where workers would else look for
    the session elsewhere; ``depth`` for what was replayed; ``gate`` for that of a gate.
    """
    header: dict[str, Any] = {
        'uid': manager.uid,
        'incarnation': incarnation,
        'instance': instance.name,
        'task_id': instance.task_id,
        'attempt': instance.attempt,
        'manager': manager.key,
        'storage': manager.storage.key,
    }
    if manager.storage.elsewhere:
        header['place'] = manager.storage.elsewhere
    if instance.depth:
        header['depth'] = instance.depth
    if instance.record.gate is not None:
        header['gate'] = True
    return header


def serving(manager: Controller, key: str) -> Controller:
    """Return the manager whose key the session stores; mostly this one."""
    if key == key_of(type(manager)):
        return manager
    other: Controller = trigger_managers.get(key, manager.storage)
    return other
