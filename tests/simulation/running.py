"""One delivery in a pool process: what ``task.py`` and ``signals.py`` make of it, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from celery_triggers.exceptions import InvalidFiring, StorageUnavailable
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.firing import Run as FiringRun
from celery_triggers.task import TaskContext
from tests.simulation.facts import Actor, FiringFact
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.worker import Held, Worker

FACTS = {'type': 'Error', 'message': 'simulated', 'traceback': '', 'context': {}}

#: Seconds after which a message comes again whose claim met no storage.
CLAIM_AGAIN = 5.0

#: What code can do; the first is what it does when nothing else is chosen.
ENDINGS = ('return', 'raise', 'retry', 'retry', 'replay', 'skip', 'reject', 'fire')


@dataclass(slots=True)
class Ending:
    """What the code of a task did in the end."""

    kind: str
    value: Any = None


class Run:
    """A delivery that a child was given."""

    def __init__(self, worker: Worker, held: Held, process: Process):
        self.worker = worker
        self.world = worker.world
        self.application = worker.application
        self.ledger = worker.application.ledger
        self.held = held
        self.task = held.task
        self.process = process
        self.header = held.message.header

    def run(self) -> None:
        """Claim, run the code, store the result, report the outcome."""
        delivery = self.worker.delivery(self.held, claimed=True)
        delivery.process = self.process.name
        if self.task.claims and not self._may_run(delivery):
            return
        execution = self.ledger.start(self.header, self.held.token, self.task)
        try:
            ending = self._code(delivery)
        except (StorageUnavailable, InvalidFiring) as exc:
            self.world.note(f'the code raises {exc}')
            ending = Ending('raise')
        self.ledger.end(execution, ending)
        self.world.point()
        self.world.happened[f'code: {ending.kind}'] += 1
        try:
            getattr(self, f'_after_{ending.kind}')(delivery, ending)
        except StorageUnavailable as exc:
            # Celery logs what a signal's handler raises, and goes on.
            self.world.note(f'a handler raises {exc}')

    # ------------------------------------------------------------------ claiming

    def _may_run(self, delivery: Delivery) -> bool:
        with self.application.reporting(delivery, 'claim'):
            if not self._ask(delivery.claim):
                return False
            self.ledger.granted(delivery.token)
            self.world.point()
            # Nothing can happen between this answer and the code: that moment is lost on
            # every real machine too.
            return self._ask(delivery.still_mine)

    def _ask(self, question: Callable[[], bool]) -> bool:
        """Ask for the right to run; while the storage is down, again and again for a time."""
        deadline = self.world.now + self.world.lease / 2
        while True:
            try:
                return question()
            except StorageUnavailable:
                if self.world.now > deadline:
                    self._come_again()
                    return False
            self.world.sleep(0.25)

    def _come_again(self) -> None:
        message = self.held.message
        try:
            self.application.broker.publish(message.again(self.world.now + CLAIM_AGAIN * 1000))
        except (OperationalError, ValueError):
            self.world.note('the broker is down too')

    # ---------------------------------------------------------------------- code

    def _code(self, delivery: Delivery) -> Ending:
        world = self.world
        length = world.pick(0.005, 0.3, 1.2, 3) * world.lease / 1000
        if world.healed:
            length = 0.005
        # Retries and the like of other tasks are Celery's alone.
        endings = ENDINGS if self.task.claims else ENDINGS[:2]
        kind = 0 if world.healed else world.choices.rarely(0.6, len(endings) - 1)
        world.sleep(length)
        world.point()
        match ENDINGS[kind]:
            case 'fire':
                self._fire()
                if world.pick(0, 0, 1):
                    return Ending('raise')
                return Ending('return', {'by': self.held.token})
            case 'retry':
                countdown = world.pick(0, 0.3, 3, 30)
                with self.application.reporting(delivery, 'retry'):
                    delivery.retry(countdown, {})
                return Ending('retry')
            case 'return':
                return Ending('return', {'by': self.held.token})
            case other:
                return Ending(other)

    def _fire(self) -> None:
        header = self.header
        delivery = self.application.delivery(header, self.held.token)
        manager: Any = delivery.manager
        run = FiringRun(
            delivery.name, header['task_id'], header['attempt'], header['incarnation'],
            self.held.token,
        )
        context = TaskContext(manager, delivery.name, {}, run=run)
        for _ in range(1 + self.world.pick(0, 1)):
            # What replays a gate fires the same as what it replays.
            who = header['task_id'] if header.get('gate') else header['instance']
            kwargs = {'from': f'{who}/{header["attempt"]}'}
            trigger = self.world.pick('b', 'c')
            with self.ledger.acting(Actor('context', ('fire', trigger), self.held.token, header)):
                answer = context.fire(trigger, kwargs)
            self.ledger.gates.fired(header, answer.event_id, duplicate=answer.duplicate)
            fact = FiringFact(header['uid'], trigger, kwargs, answer.event_id, answered=True)
            fact.asked.add(answer.event_id)
            self.ledger.firings.append(fact)

    # ------------------------------------------------------------------ afterwards

    def _after_return(self, delivery: Delivery, ending: Ending) -> None:
        if not self._store('SUCCESS', ending.value):
            self._trace_fails()
            return
        began = self.world.now
        with self.application.reporting(delivery, 'success'):
            counted = delivery.finish(ending.value)
        if not counted and self.world.now - began < 1000:
            self.ledger.refused_success(delivery)

    def _trace_fails(self) -> None:
        """Celery's tracer fails with the result backend.

        Its parent reports that, unless the backend is still down: then nothing is said.
        """
        if self.world.pick(0, 1):
            self.worker.report_failure(self.held)

    def _after_raise(self, delivery: Delivery, ending: Ending) -> None:
        if not self._store('FAILURE', RuntimeError('simulated')):
            self._trace_fails()
            return
        with self.application.reporting(delivery, 'failure'):
            delivery.fail('raised', FACTS)

    def _after_retry(self, delivery: Delivery, ending: Ending) -> None:
        self._store('RETRY')

    def _after_skip(self, delivery: Delivery, ending: Ending) -> None:
        with self.application.reporting(delivery, 'skip'):
            counted = delivery.skip(None)
        if counted:
            self._store('SUCCESS')

    def _after_replay(self, delivery: Delivery, ending: Ending) -> None:
        with self.application.reporting(delivery, 'replay'):
            countdown = self.world.pick(0, 0.5, 20)
            counted = delivery.replay({}, None, countdown) or delivery.fail(
                'cannot be replayed', FACTS, untold=True
            )
        # The result of a gate is still to come, under the same id.
        if counted and not self.header.get('gate'):
            self._store('SUCCESS')

    def _after_reject(self, delivery: Delivery, ending: Ending) -> None:
        """The code raised ``Reject(requeue=True)``."""
        with self.application.reporting(delivery, 'requeue'):
            delivery.requeue(send=not self.task.late)
        self.held.given_back = self.task.late

    def _store(self, state: str, value: Any = None) -> bool:
        """Store a result; tell whether the result backend took it."""
        if not self.task.stores:
            self.world.point()
        else:
            try:
                self.application.results.store(self.header['task_id'], state, value)
            except ConnectionError:
                return False
        if self.header.get('gate') and state != 'RETRY':
            self._count(stored=self.task.stores)
        return True

    def _count(self, *, stored: bool) -> None:
        """Count a gate as a part of its chord, which Celery does after it has stored."""
        gates = self.ledger.gates
        if stored:
            gates.stored(self.header)
        self.world.point()
        if self.held.message.chord:
            self.world.happened['chord part counted'] += 1
            gates.counted(self.header)
