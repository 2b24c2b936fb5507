"""Simulated workers: what ``task.py``, ``request.py`` and ``signals.py`` do, without Celery.

A host has a parent with threads that consume, beat, sweep and report, and children
that run code. Any of it can die or stop at any point.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from billiard.exceptions import WorkerLostError

from celery_triggers.engine.calls import END
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager.delivery import Delivery
from celery_triggers.sweep import Sweep
from celery_triggers.worker.heart import Heart
from tests.simulation.application import SimulatedApplication
from tests.simulation.broker import Message
from tests.simulation.ending import EndRun
from tests.simulation.facts import Actor
from tests.simulation.running import FACTS, Run
from tests.simulation.scenario import SimulatedTask
from tests.simulation.storage import URL, SimulatedStorageBackend
from tests.simulation.world import Host, Killed

CHILD_FAULTS = ('kill process', 'kill host', 'stop process', 'stop host', 'jump ahead', 'jump back')
PARENT_FAULTS = ('kill host', 'kill parent', 'stop host', 'jump ahead', 'jump back')

#: How many messages a worker takes beyond those that run.
PREFETCH = 2

#: The task that tells the ends of gates, as Celery sees it.
END_TASK = SimulatedTask(END, claims=False, stores=False)


@dataclass(slots=True, eq=False)
class Held:
    """A delivery that a worker's parent holds.

    Attributes:
        token: The claim token that parent and child know.
        ready_at: When its ETA has come.
    """

    message: Message
    task: SimulatedTask
    token: str
    ready_at: int = 0
    done: bool = False
    lost: bool = False
    given_back: bool = False


class Child:
    """A pool process: it is given one delivery at a time."""

    def __init__(self, worker: Worker, name: str):
        self.worker = worker
        self.world = worker.world
        self.held: Held | None = None
        self.process = self.world.spawn(name, self._loop, worker.host, CHILD_FAULTS)
        self.process.on_death = self._died

    def give(self, held: Held) -> None:
        self.held = held
        self.world.wake(self.process)

    def _loop(self) -> None:
        while True:
            while self.held is None:
                if self.worker.host.dead:
                    # An orphan ends when it has nothing to do.
                    return
                self.world.block()
            if self.held.task is END_TASK:
                EndRun(self.worker.application, self.held).run()
            else:
                Run(self.worker, self.held, self.process).run()
            self.held.done = True
            self.held = None
            self.world.wake(self.worker.consumer)

    def _died(self) -> None:
        if not self.worker.host.dead:
            self.worker.lost_child(self)


class Worker:
    """A worker: its parent's threads and its children.

    Args:
        children: How many pool processes it has.
        sweeps: The seconds between its sweeps; 0: it does not sweep.
        generation: How many there were before under the same name.
    """

    def __init__(
        self,
        application: SimulatedApplication,
        name: str,
        children: int,
        sweeps: float,
        generation: int = 1,
    ):
        world = self.world = application.world
        self.application = application
        self.broker = application.broker
        self.name, self.size, self.sweeps = name, children, sweeps
        self.generation = generation
        name = f'{name}.{generation}'
        self.host = Host(name, restart=self._restart)
        self.host.on_death = self._vanished
        self.held: list[Held] = []
        self.stopping = False
        self.reports: deque[Callable[[], None]] = deque()
        self.children = [Child(self, f'{name} child {i}') for i in range(self.size)]
        self.consumer = world.spawn(f'{name} consumer', self._consume, self.host, PARENT_FAULTS)
        self.beater = world.spawn(f'{name} beater', self._beat, self.host, PARENT_FAULTS)
        self.reporter = world.spawn(f'{name} reporter', self._report, self.host, PARENT_FAULTS)
        if self.sweeps:
            world.spawn(f'{name} sweeper', self._sweep, self.host, PARENT_FAULTS)
        self.broker.listeners.append(self.consumer)
        application.workers.append(self)

    def _restart(self) -> None:
        # A new one, so that children that outlive their parent keep the old one.
        self.application.workers.remove(self)
        Worker(self.application, self.name, self.size, self.sweeps, self.generation + 1)

    def _vanished(self) -> None:
        if self.consumer in self.broker.listeners:
            self.broker.listeners.remove(self.consumer)
        self.broker.restore([held.message for held in self.held])

    @property
    def is_idle(self) -> bool:
        return not self.held and not self.reports

    # ------------------------------------------------------------------ consuming

    def _consume(self) -> None:
        world = self.world
        while True:
            self._finish_done()
            if world.strikes('cold restart'):
                self._restart_cold()
            if world.strikes('warm restart'):
                self.stopping = True
            if self.stopping and not any(child.held for child in self.children):
                self._restart_warm()
            free = [child for child in self.children if child.held is None]
            if self._has_room():
                message = self.broker.take()
                if message is not None:
                    self._receive(message)
                    continue
            ready = [h for h in self._waiting() if h.ready_at <= world.now]
            if free and ready and not self.stopping:
                self._start(free[0], ready[0])
                continue
            self._wait()

    def _wait(self) -> None:
        # Nothing may come between this look and the wait, or it would be missed.
        free = any(child.held is None for child in self.children)
        ready = any(h.ready_at <= self.world.now for h in self._waiting())
        ready = ready and not self.stopping
        if any(h.done for h in self.held) or (free and ready) or self._can_take():
            return
        later = [h.ready_at for h in self._waiting() if h.ready_at > self.world.now]
        late = [m.visible_at for m in self.broker.queue if m.visible_at > self.world.now]
        if later or late:
            self.world.sleep((min(later + late) - self.world.now) / 1000)
        else:
            self.world.block()

    def _has_room(self) -> bool:
        return not self.stopping and len(self.held) < self.size + PREFETCH

    def _can_take(self) -> bool:
        return self._has_room() and bool(self.broker.ready())

    def _waiting(self) -> list[Held]:
        running = [child.held for child in self.children]
        return [h for h in self.held if h not in running and not h.done and not h.lost]

    def _receive(self, message: Message) -> None:
        world, application = self.world, self.application
        task = END_TASK if message.run == END else application.tasks[message.run]
        held = Held(message, task, world.serial('token-') if task.claims else '')
        held.ready_at = message.not_before
        self.held.append(held)
        world.note(f'received {message} as {held.token}')
        world.point()
        if task is END_TASK:
            return
        ending = world.strikes('message revoked', 'message expired')
        if ending:
            delivery = self.delivery(held)
            reason = ending.removeprefix('message ')
            if self._store_end(held, 'REVOKED'):
                self.submit(lambda: self._end_unrun(delivery, reason))
                self._let_go(held)
            else:
                # It comes again with the connection.
                self._give_back(held)

    def _store_end(self, held: Held, state: str, value: Any = None) -> bool:
        """Do with the result of a gate what the parent does; tell whether it could."""
        message = held.message
        if not _of_gate(held):
            return True
        try:
            if held.task.stores:
                self.application.results.store(message.header['task_id'], state, value)
                self.application.ledger.gates.stored(message.header)
        except ConnectionError:
            self.world.note('the result backend is down')
            return False
        self.world.point()
        if message.chord:
            self.application.ledger.gates.counted(message.header)
        return True

    def _end_unrun(self, delivery: Delivery, reason: str) -> None:
        with self.application.reporting(delivery, reason):
            if reason == 'revoked':
                delivery.revoke(reason)
            else:
                delivery.fail(reason, FACTS)

    def _start(self, child: Child, held: Held) -> None:
        if not held.task.late:
            self.broker.acknowledge(held.message)
            self.world.point()
        child.give(held)

    def _finish_done(self) -> None:
        for held in [h for h in self.held if h.done]:
            if held.given_back:
                self.broker.requeue(held.message)
            self._let_go(held)
            self.world.point()

    def _let_go(self, held: Held) -> None:
        if held in self.held:
            self.held.remove(held)
        self.broker.acknowledge(held.message)

    def delivery(self, held: Held, *, claimed: bool = False) -> Delivery:
        """Return what a delivery reports with; its child knows that it has claimed."""
        delivery = self.application.delivery(held.message.header, held.token)
        delivery.loss = held.task.loss
        delivery.claimed = claimed and held.task.claims
        delivery.patience = self.world.lease / 1000
        return delivery

    def submit(self, report: Callable[[], object]) -> None:
        """Report through the queue of the parent."""
        self.reports.append(report)
        self.world.wake(self.reporter)

    # -------------------------------------------------------------- lost children

    def lost_child(self, child: Child) -> None:
        """Celery noticed that a child is gone: what its request does then."""
        world = self.world
        held = child.held
        self.children.remove(child)
        following = Child(self, f"{child.process.name}'")
        self.children.append(following)
        world.wake(self.consumer)
        if held is None or held not in self.held:
            return
        if held.task.claims and world.strikes('begun unnoticed'):
            # Its parent has not read yet that it had begun, and gives the request away.
            following.give(held)
            return
        world.note(f'the loss of {child.process} is noticed')
        held.lost = True
        self.submit(lambda: self._report_loss(held))

    def _report_loss(self, held: Held) -> None:
        if held.task is END_TASK:
            self._give_back(held)
            return
        if held.task.late and held.task.claims and not self._is_replayed(held):
            # Celery gives the message back; what is reported may come before or after that.
            if self.world.pick(0, 1):
                self._give_back(held)
            self._lose(held, 'the child died')
            self._give_back(held)
            return
        stored = self._store_failure(held)
        self._let_go(held)
        # A task without a claim has a signal alone, which comes after that.
        if stored or held.task.claims or not _of_gate(held):
            self._lose(held, 'the child died')

    @staticmethod
    def _is_replayed(held: Held) -> bool:
        """Tell whether Celery stores the loss of a gate, since its message is not given back."""
        return _of_gate(held) and held.task.most_replays >= 0

    def _give_back(self, held: Held) -> None:
        self.broker.requeue(held.message)
        self._let_go(held)

    def _lose(self, held: Held, message: str) -> None:
        delivery = self.delivery(held)
        if self._finished_after_all(held, delivery):
            return
        with self.application.reporting(delivery, 'lost'):
            if held.task.claims:
                delivery.lose(message, untold=held.task.late)
            else:
                delivery.fail('worker lost', FACTS)

    def report_failure(self, held: Held) -> None:
        """Report a failure that the tracer could not store, as Celery's parent does."""
        delivery = self.delivery(held)

        def report() -> None:
            if not self._store_end(held, 'FAILURE', RuntimeError('simulated')):
                return
            if self._finished_after_all(held, delivery):
                return
            with self.application.reporting(delivery, 'failure'):
                delivery.fail('raised', FACTS)

        self.submit(report)

    def _finished_after_all(self, held: Held, delivery: Delivery) -> bool:
        try:
            stored = self.application.results.get(held.message.header['task_id'])
        except ConnectionError:
            return False
        if stored is None or stored.state != 'SUCCESS':
            return False
        with self.application.reporting(delivery, 'success'):
            return delivery.finish(stored.value, untold=True)

    def _store_failure(self, held: Held) -> bool:
        """Store that a child was lost, as Celery does; tell whether that came to its end."""
        error = WorkerLostError('simulated')
        if _of_gate(held):
            return self._store_end(held, 'FAILURE', error)
        if held.task.stores:
            try:
                self.application.results.store(held.message.header['task_id'], 'FAILURE', error)
            except ConnectionError:
                self.world.note('the result backend is down')
        return True

    def _restart_warm(self) -> None:
        """Stop when nothing runs any more, as after a SIGTERM, and start again."""
        for held in self.held:
            if held.task.late and held.task.claims:
                delivery = self.delivery(held)
                delivery.patience = 0.0
                self._quietly(lambda d=delivery: self._requeue(d))
        while self.reports:
            self.world.sleep(0.1)
        self.world.kill_host(self.host)
        raise Killed

    def _restart_cold(self) -> None:
        """Stop at once, as after a second SIGTERM, and start again."""
        world = self.world
        for child in self.children:
            world.kill(child.process)
        running = [child.held for child in self.children]
        for held in [h for h in self.held if not h.done]:
            if held.task.late and held.task.claims:
                delivery = self.delivery(held)
                delivery.patience = 0.0
                self._quietly(lambda d=delivery: self._requeue(d))
            elif held in running and (held.task.claims or not _of_gate(held)):
                # Of a task without a claim Celery says nothing.
                self._quietly(lambda h=held: self._lose(h, 'the worker was shut down'))
        world.kill_host(self.host)
        raise Killed

    def _requeue(self, delivery: Delivery) -> None:
        with self.application.reporting(delivery, 'requeue'):
            delivery.requeue()

    def _quietly(self, report: Callable[[], object]) -> None:
        try:
            report()
        except StorageUnavailable as exc:
            self.world.note(f'a report is lost: {exc}')

    def _report(self) -> None:
        while True:
            while not self.reports:
                self.world.block()
            self._quietly(self.reports[0])
            self.reports.popleft()

    # ------------------------------------------------------------ beats and sweeps

    def _beat(self) -> None:
        while True:
            self.world.sleep(self.world.lease / 4000)
            held = [h for h in self.held if h.task.claims and not h.done and not h.lost]
            if held:
                self.world.happened['beat'] += len(held)
                heart: Any = SimpleNamespace(_deliveries=lambda h=held: map(self.delivery, h))
                with self.application.ledger.acting(Actor('beat')):
                    Heart.beat(heart)

    def _sweep(self) -> None:
        while True:
            self.world.sleep(self.sweeps)
            sweep_once(self.application)


def _of_gate(held: Held) -> bool:
    return bool(held.message.header.get('gate'))


def sweep_once(application: SimulatedApplication) -> None:
    """Make one pass over what is due."""
    world = application.world
    with application.ledger.acting(Actor('sweep')):
        try:
            report = Sweep(application, SimulatedStorageBackend, URL).run(
                application.sweep_limit
            )
        except StorageUnavailable as exc:
            world.note(f'the sweep met no storage: {exc}')
            return
    for name in report.__slots__:
        value = getattr(report, name)
        if isinstance(value, int) and value:
            world.happened[f'sweep: {name}'] += value
    if report.taken:
        world.note(f'swept: {report}')
