"""The simulated application: what the product asks of ``app.triggers``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from kombu.exceptions import OperationalError

from celery_triggers import runners  # noqa: F401  (registers the runners)
from celery_triggers.engine.calls import END
from celery_triggers.engine.configuration import Configuration
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import trigger_managers
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.release import Release
from celery_triggers.runners.broker_thread import BrokerDown, Job
from celery_triggers.runners.dispatcher import Dispatcher
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.wiring import StoredOutcome
from tests.simulation.broker import Broker, Message
from tests.simulation.facts import Actor
from tests.simulation.ledger import Ledger
from tests.simulation.storage import URL, SimulatedStorageBackend
from tests.simulation.world import World

#: For how long nothing is sent after the broker failed, in milliseconds.
BROKER_PAUSE = 500

#: States in which a task has ended.
READY = ('SUCCESS', 'FAILURE', 'REVOKED')


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What a result backend keeps of a task."""

    state: str
    value: Any
    at: int


class Results:
    """A result backend; a stored success is never overwritten, as Celery does it."""

    def __init__(self, world: World):
        self.world = world
        self.stored: dict[str, StoredResult] = {}
        #: When each was last asked for.
        self.asked: dict[str, int] = {}
        self.down_until = 0

    def store(self, task_id: str, state: str, value: Any = None) -> None:
        """Keep the result of a task.

        Raises:
            ConnectionError: The backend does not answer.
        """
        self._ask()
        known = self.stored.get(task_id)
        if known is None or known.state != 'SUCCESS':
            self.stored[task_id] = StoredResult(state, value, self.world.now)
            self.world.note(f'stored {state} of {task_id}')

    def get(self, task_id: str) -> StoredResult | None:
        """Return the result of a task.

        Raises:
            ConnectionError: The backend does not answer.
        """
        self._ask()
        self.asked[task_id] = self.world.now
        return self.stored.get(task_id)

    def show_waiting(self, task_id: str) -> None:
        """Keep that a task waits, unless it is known to have ended.

        Raises:
            ConnectionError: The backend does not answer.
        """
        self._ask()
        known = self.stored.get(task_id)
        if known is None or known.state not in READY:
            self.world.happened['shown to wait'] += 1
            self.store(task_id, 'WAITING')

    def _ask(self) -> None:
        world = self.world
        world.point()
        if world.strikes('result backend down'):
            self.down_until = world.now + int(world.lease * world.pick(0.2, 2))
        if self.down_until > world.now and not world.healed:
            raise ConnectionError('the result backend is down')


class SimulatedApplication:
    """``app.triggers`` without Celery."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        ledger: Ledger,
        configuration: Mapping[str, Any],
        tasks: Mapping[str, Any],
        values: Mapping[str, Any],
    ):
        self.world = world
        self.broker = broker
        self.ledger = ledger
        self.tasks = tasks
        self.workers: list[Any] = []
        self.sweep_limit = 100
        self.results = Results(world)
        self.configuration = Configuration.parse(configuration)
        found = {'triggers_unheard': 'ignore', 'triggers_storage': URL, **values}
        self.settings = Settings(
            lambda name, default=None: found.get(name, default), lambda: None
        )
        self.publisher = SimulatedPublisher(world, broker)
        self.celery = _App(self)
        self._dispatcher = Dispatcher(self.celery, self.settings)
        self._dispatcher.publisher = self.publisher  # type: ignore[assignment]

    # --------------------------------------------------- the product's protocol

    def configuration_for(self, uid: str) -> Configuration:
        return self.configuration

    def check_storage(self, storage: StorageBackend) -> None:
        pass

    def dispatch(self, releases: Sequence[Release]) -> int:
        for release in releases:
            if not release.ends:
                self.ledger.note_run(release)
        return self._dispatcher.dispatch(releases)

    def makes_claims(self, task_name: str) -> bool | None:
        task = self.tasks.get(task_name)
        return task.claims if task is not None else None

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        try:
            found = self.results.get(task_id)
        except ConnectionError:
            return None
        if found is None or found.state not in READY:
            return None
        return StoredOutcome(found.state, found.value, found.at)

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        try:
            self.results.show_waiting(task_id)
        except ConnectionError:
            self.world.note('the result backend is down')

    def async_result(self, task_id: str) -> Any:
        raise NotImplementedError

    # ------------------------------------------------------------------ helpers

    def delivery(self, header: Mapping[str, Any], token: str) -> Delivery:
        """Return a delivery, as ``services_of(app).delivery`` does."""
        return Delivery(self.session(header['uid'], header['manager']), header, token)

    def session(self, uid: str, manager: str, storage: str = '') -> Any:
        """Return the manager of a session, as ``app.triggers.session`` does."""
        return trigger_managers.get(
            manager, SimulatedStorageBackend(uid, URL, application=self)
        )

    def reporting(self, delivery: Delivery, what: str) -> Any:
        """Whatever follows is this delivery's doing."""
        return self.ledger.acting(Actor('report', what, delivery.token, delivery.header))


class SimulatedPublisher:
    """Stands for the publisher's thread: callers wait for it for two seconds at most."""

    def __init__(self, world: World, broker: Broker):
        self.world = world
        self.broker = broker
        self.paused_until = 0

    @property
    def paused(self) -> bool:
        return self.world.now < self.paused_until and not self.world.healed

    @contextmanager
    def recording(self) -> Iterator[tuple[dict[str, Any], list[Message]]]:
        """Give an option of ``apply_async`` with which it only says what it would send."""
        wire: list[Message] = []
        yield {'wire': wire}, wire

    def publish(self, job: Job) -> list[int]:
        """Send a job's messages; return the positions of those that were sent in time."""
        world = self.world
        if self.paused:
            return []
        if world.strikes('publishing hangs'):
            # The thread goes on when its caller has given up, unless the process dies.
            delay = int(1000 * world.pick(1, 3, 10))
            world.spawn_thread('publisher', lambda: self._run(job), delay)
            world.sleep(min(delay / 1000, 2))
        else:
            self._run(job)
        return list(job.sent)

    def _run(self, job: Job) -> None:
        connection: Any = self
        try:
            job.run(connection, lambda: None)
        except BrokerDown as exc:
            self.world.note(f'not sent: {exc}')
            self.paused_until = self.world.now + BROKER_PAUSE
        except StorageUnavailable as exc:
            self.world.note(f'not noted: {exc}')

    def send(self, wire: Any) -> None:
        """Send a message; once more, since a connection may be dead.

        Raises:
            BrokerDown: The broker does not answer.
        """
        for message in wire:
            for attempt in (1, 2):
                try:
                    self.broker.publish(replace(message))
                    break
                except OperationalError as exc:
                    if attempt == 2:
                        raise BrokerDown(str(exc)) from exc


class _App:
    """As much of a Celery application as the dispatcher and the runner look at."""

    conf = SimpleNamespace(task_always_eager=False, task_inherit_parent_priority=False)
    thread_oid = ''

    def __init__(self, application: SimulatedApplication):
        self.tasks = {
            name: _Task(name, application.broker) for name in (*application.tasks, END)
        }


class _Task:
    """A Celery task that can be sent."""

    takes_context = False

    def __init__(self, name: str, broker: Broker):
        self.name = name
        self.broker = broker

    def apply_async(self, args: Any = (), kwargs: Any = None, **options: Any) -> None:
        eta = options.get('eta')
        not_before = round(eta.timestamp() * 1000) if eta is not None else 0
        if self.name == END:
            assert kwargs is not None
            number = self.broker.world.serial('end-')
            message = Message(kwargs['header'], END, end=kwargs, id=number)
        else:
            chord = bool(options.get('chord'))
            message = Message(options['headers']['triggers'], self.name, not_before, chord=chord)
        if 'wire' in options:
            options['wire'].append(message)
        else:
            self.broker.publish(message)
