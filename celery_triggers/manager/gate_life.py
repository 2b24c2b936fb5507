"""What happens to gates in a session: they are applied, revoked, and ended without having run.

A gate that ends without having run ends its Celery result too. That is done by a task of
this package, in a worker, whose message is sent like that of any released instance: with
a due date behind it. :class:`GateEnd` sees to it that it is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from celery_triggers.engine import plans
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.step import Step
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.manager.change import Outcome
from celery_triggers.manager.controller import Controller
from celery_triggers.manager.follow_up import make_change, prepare
from celery_triggers.storages.records import StorageTime, Write

__all__ = ['GateEnd', 'apply_gate', 'revoke_gate']


def apply_gate(
    manager: Controller,
    name: str,
    task_id: str,
    gate: Gate,
    *,
    until: int = 0,
    fresh: bool = False,
    place: str = '',
    waits: Callable[[str], object] | None = None,
) -> Outcome[Status]:
    """Store a gate in a session; what it releases at once is still to be sent.

    Applying the same task id again does nothing: a worker that dies after it has applied
    a gate has its own task delivered again, and that applies it again.

    Args:
        name: The name of the gate's trigger task.
        until: Its deadline, in milliseconds of the storage's clock; 0: none.
        fresh: Whether only what is fired from now on counts.
        place: The instance in whose place it stands, under whose task id it is applied.
        waits: Is called with the instance's name if it waits, before that is committed.

    Raises:
        InvalidConfiguration: The session has a trigger task of this name.
        StorageUnavailable: The storage did not answer; applying it again is safe.
    """
    config = gate.config(name)

    def decide(step: Step) -> Status:
        if name in step.session.configuration:
            raise InvalidConfiguration(
                f'session {manager.uid!r} has a trigger task of this name; give the gate another',
                task=name, directive='trigger_name',
            )
        instance = step.wait_at_gate(name, task_id, replace(gate), until=until, fresh=fresh)
        if instance.status is Status.UNSTARTED and waits is not None:
            waits(instance.name)
        return instance.status

    return prepare(
        manager,        plans.gate(name, config.triggers), decide,
        event_id=f'gate:{task_id}:{place}' if place else f'gate:{task_id}',
        identity=(name, None),
    ).make()


def revoke_gate(manager: Controller, name: str, task_id: str, reason: str = 'revoked') -> bool:
    """Revoke a gate that waits; tell whether it did.

    Raises:
        StorageUnavailable: The storage did not answer; calling again is safe.
    """

    def decide(step: Step) -> bool:
        instance = step.session.instance(name)
        if (
            instance is None
            or instance.gate is None
            or (instance.task_id, instance.status) != (task_id, Status.UNSTARTED)
        ):
            return False
        step.revoke(instance, reason)
        return True

    outcome = make_change(manager, plans.outcome(name), decide)
    # Without a value this very change was found to have been made.
    return outcome.value is not False


@dataclass(slots=True)
class GateEnd:
    """The right to tell those who wait for a gate's result that it has ended.

    Args:
        manager: Of the session that the header names.
        header: See :func:`.header_of`.
        token: Whoever tells them.
    """

    manager: Controller
    header: Mapping[str, Any]
    token: str

    def claim(self) -> bool:
        """Take the right to do it; tell whether it is still to be done, and nobody is at it.

        A session that was deleted cannot say so any more: then it is done.

        Raises:
            StorageUnavailable: The storage did not answer.
        """
        lease = StorageTime(int(float(self.manager.storage.settings.lease) * 1000))
        granted, row = self.manager.storage.write(
            self._write('', {'token': self.token, 'lease': lease}, lease)
        )
        return granted or row is None

    def give_up(self) -> None:
        """Give the right back: it could not be done now.

        Raises:
            StorageUnavailable: The storage did not answer. It is given back when its lease ends.
        """
        self.manager.storage.write(
            self._write(self.token, {'token': '', 'lease': 0}, StorageTime())
        )

    def done(self) -> None:
        """Note that they know.

        Raises:
            StorageUnavailable: The storage did not answer. They are told once more then.
        """
        self.manager.storage.write(
            self._write(self.token, {'loss': '', 'token': '', 'lease': 0}, 0)
        )

    def _write(
        self, token: str, changes: Mapping[str, Any], due: int | StorageTime
    ) -> Write:
        guard = {'task_id': self.header['task_id'], 'loss': ENDING, 'token': token}
        return Write(
            str(self.header['instance']), str(self.header['incarnation']), [guard], changes, due
        )
