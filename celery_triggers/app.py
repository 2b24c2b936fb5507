"""``app.triggers``: the wiring of everything below to one Celery application."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import datetime
from os import PathLike
from typing import TYPE_CHECKING, Any

from celery import _state, states
from celery.app.base import Celery as _Celery
from celery.result import EagerResult

from celery_triggers.canvas.own_tasks import add_own_tasks
from celery_triggers.engine.configuration import Configuration, TaskConfig
from celery_triggers.engine.schema import configuration_schema
from celery_triggers.exceptions import (
    InvalidConfiguration,
    StorageNotConfigured,
    StorageUnavailable,
    TriggersError,
    UnknownKey,
)
from celery_triggers.forks import ForkLock
from celery_triggers.loading import configuration_in
from celery_triggers.manager import Firing, Release, TriggerManager
from celery_triggers.manager.change import Outcome
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.firing import ReadyFiring, fire_all
from celery_triggers.registry import storage_backends, trigger_managers
from celery_triggers.runners.dispatcher import Dispatcher
from celery_triggers.runners.runners import EagerError, run_one
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend, public_url
from celery_triggers.sweep.sweep import MOST_AT_ONCE, Sweep, SweepReport
from celery_triggers.task import TriggerTask
from celery_triggers.task.decorator import Spoken, check_sessions, declare, declare_shared
from celery_triggers.task.workflow import Workflow, Workflows
from celery_triggers.wiring import StoredOutcome
from celery_triggers.worker import signals
from celery_triggers.worker.bootstep import SweeperStep
from celery_triggers.worker.heart import beat_while
from celery_triggers.worker.result_backend import StoredOutcomes

__all__ = ['Celery', 'Triggers', 'current_triggers', 'shared_trigger_task', 'triggers_of']

logger = logging.getLogger(__name__)

_made = ForkLock()


class Triggers:
    """Everything that an application does with triggers: ``app.triggers``."""

    def __init__(self, app: Any):
        self.app = app
        self.settings = Settings(self._setting, self._state_of_settings)
        self.workflows = Workflows()
        self._dispatcher = Dispatcher(app, self.settings)
        self._outcomes = StoredOutcomes(app)
        self._knows_tasks = False
        self._loading = threading.local()
        signals.connect()
        add_own_tasks(self)

    def __repr__(self) -> str:
        return f'<Triggers of {self.app!r}>'

    def _setting(self, name: str, default: Any) -> Any:
        if name in ('broker_url', 'result_backend'):
            # Celery looks at the environment too for these.
            return getattr(self.app.conf, name)
        return self.app.conf.get(name, default)

    def _state_of_settings(self) -> object:
        """Return what differs when a setting was set: Celery keeps such changes apart."""
        conf = self.app.conf
        if not self.app.configured:
            # Until Celery has read them it takes all settings for changes, which not every
            # object of Django's that holds some can list.
            conf.get('broker_url')
        return id(conf), tuple(conf.changes.values()), self.app.configured

    # ------------------------------------------------------------------ firing

    def fire(
        self,
        uid: str,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        event_id: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        connection: Any = None,
    ) -> Firing:
        """Fire a trigger into a session: see :meth:`.TriggerManager.fire`."""
        return self.session(uid).fire(
            trigger_name, trigger_kwargs, event_id=event_id, countdown=countdown, eta=eta,
            connection=connection,
        )

    async def afire(self, *args: Any, **kwargs: Any) -> Firing:
        """As :meth:`fire`, awaited: the call runs in a thread."""
        return await asyncio.to_thread(self.fire, *args, **kwargs)

    def fire_many(self, firings: Iterable[tuple[Any, ...] | Mapping[str, Any]]) -> list[Firing]:
        """Fire many triggers in fewer round trips than one after the other takes.

        Each is applied whole or not at all, as by :meth:`fire`; those into the same
        session in the order given. On Redis, firings into different sessions share their
        round trips, up to 200 at a time.

        Args:
            firings: Tuples or mappings of the arguments of :meth:`fire`.

        Returns:
            An answer for each.

        Raises:
            InvalidFiring: One was refused before anything was fired.
            TriggersError: The first error that came while they were applied. Its
                attribute ``firings`` has the answers by position, ``None`` for a firing
                that was not made or of which that is unknown. With an event id for each,
                repeating the whole call is safe.
        """
        ready = [
            self._ready(**firing) if isinstance(firing, Mapping) else self._ready(*firing)
            for firing in firings
        ]
        return fire_all(ready)

    def _ready(
        self,
        uid: str,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ReadyFiring:
        return self.session(uid).ready(trigger_name, trigger_kwargs, **options)

    # ---------------------------------------------------------------- sessions

    def session(
        self,
        uid: str,
        manager: str | None = None,
        storage: str | StorageBackend | None = None,
    ) -> TriggerManager:
        """Return the trigger manager of a session.

        Args:
            manager: A registry key; without one, the setting ``triggers_manager``.
            storage: A registry key or a storage backend; without one, that of the
                setting ``triggers_storage``.

        Raises:
            UnknownKey: There is no such manager or storage; the error lists those known.
        """
        if not isinstance(storage, StorageBackend):
            storage = self.storage(uid, storage)
        with _blaming('triggers_manager', unless=manager):
            found: TriggerManager = trigger_managers.get(
                manager or storage.settings.manager, storage
            )
        return found

    def storage(
        self, uid: str, key: str | None = None, url: str | None = None
    ) -> StorageBackend:
        """Return the storage backend of a session."""
        with _blaming('triggers_storage', unless=key):
            found: StorageBackend = storage_backends.get(
                key or self.settings.frozen().storage_location()[0], uid, url, application=self
            )
        return found

    def sessions(self, prefix: str = '') -> Iterator[str]:
        """Yield the uids of the sessions that begin with ``prefix``, in no order."""
        key, url = self.settings.frozen().storage_location()
        found: Iterator[str] = storage_backends.get_class(key).uids(url, self.settings, prefix)
        return found

    def sweep(self, limit: int = MOST_AT_ONCE) -> SweepReport:
        """See to what is overdue: once, here and now.

        Workers do so by themselves. Many may sweep at the same time: they share the work.

        Args:
            limit: About how many due dates to take at most; the report says whether more
                is due.

        Raises:
            StorageUnavailable: The storage did not say what is due.
        """
        return self.new_sweep().run(limit)

    def new_sweep(self) -> Sweep:
        """Return a pass over what is overdue, which is still to be made."""
        key, url = self.settings.frozen().storage_location()
        return Sweep(self, storage_backends.get_class(key), url)

    def delete(self, uid: str) -> bool:
        """Cancel a session and remove it; tell whether there was one.

        Raises:
            TriggersError: Gates in it have ended, and nobody could be told who waits for
                their results, since the broker is down or this is part of a transaction.
                The session is cancelled and not removed; call again when the broker is back,
                or after the commit.
        """
        manager = self.session(uid)
        if not manager.storage.exists:
            return False
        manager.cancel('deleted')
        untold = [
            name for name, instance in manager.storage.instances.items()
            if instance.record.is_ending
            and not instance.record.sends
            and not instance.record.token
        ]
        if untold:
            within = manager.storage.takes_part()
            raise TriggersError(
                f'session {uid!r} is cancelled, but not deleted: '
                + ('until your transaction is committed nobody sends' if within else
                   'the broker did not take')
                + f' the messages which end the results of {", ".join(untold)}; call delete() again'
            )
        return manager.storage.delete()

    # ----------------------------------------------------------- configuration

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The trigger tasks of every session (the workflow ``''``) by name."""
        return self.workflow('').tasks

    def workflow(self, prefix: str) -> Workflow:
        """Return the workflow of the uids that begin with ``prefix``."""
        return Workflow(self, prefix)

    def configure(self, configuration: Mapping[str, Any], sessions: str = '') -> None:
        """Add trigger tasks, ``{name: directives}``, for the uids with a prefix.

        Raises:
            InvalidConfiguration: It was refused whole; nothing changed.
        """
        self.workflows.add(check_sessions(sessions), configuration)

    def load(self, path: str | PathLike[str], sessions: str = '') -> None:
        """Add the trigger tasks of a file, for the uids with a prefix.

        Args:
            path: A file that holds ``{name: directives}``: ``.json``, ``.toml`` (before
                Python 3.11 with the extra ``toml``), ``.yaml`` or ``.yml`` (with the extra
                ``yaml``).

        Raises:
            InvalidConfiguration: It was refused whole; the error names file and line.
            MissingExtra: The extra of its format is not installed.
        """
        prefix = check_sessions(sessions)
        with configuration_in(path) as configuration:
            self.workflows.add(prefix, configuration)

    @staticmethod
    def schema() -> dict[str, Any]:
        """Return the JSON Schema of a configuration, for editors and other tools."""
        return configuration_schema()

    def configuration_for(self, uid: str) -> Configuration:
        """Return what a new session of this uid starts with.

        Raises:
            InvalidConfiguration: A trigger task is declared wrongly, or a module that may
                declare some cannot be imported.
        """
        self.learn_tasks()
        return self.workflows.for_uid(uid)

    def learn_tasks(self) -> None:
        """Import ``include``, ``imports`` and what is autodiscovered, as a worker does.

        A process that only fires would else begin sessions that lack their trigger tasks.
        """
        if self._knows_tasks:
            return
        if getattr(self._loading, 'now', False):
            logger.warning(
                'a trigger is fired while modules with trigger tasks are still being imported; '
                'its session begins with those that are known so far'
            )
            return
        self._loading.now = True
        try:
            if not self.app.loader.worker_initialized:
                self.app.loader.import_default_modules()
            if not self.app.finalized:
                self.app.finalize(auto=True)
            self._knows_tasks = True
        except InvalidConfiguration:
            raise
        except Exception as exc:
            raise InvalidConfiguration(
                "a module of the application's tasks cannot be imported here, and a session "
                'begins with the trigger tasks that the process knows which fires first: '
                f'{type(exc).__name__}: {exc}'
            ) from exc
        finally:
            self._loading.now = False

    def trigger_task(self, *args: Any, **options: Any) -> Any:
        """Decorate a function, a :class:`.TriggerTask` class or a task as a trigger task.

        Args:
            after: What must have been fired: trigger names, tasks or a condition.
            unless: What forbids it. For more than one trigger write
                ``any_of(...)`` or ``all_of(...)``.
            and_every: The trigger of which each firing asks for an instance.
            with_params: Static kwargs, ``{trigger: {name: value}}``.
            using: The key of a task runner.
            sessions: The prefix of the uids that it is for.
            trigger_name: Its name; ``t_<function>`` by default.
            options: What ``@app.task`` takes; ``shared`` is ``False`` by default.

        Raises:
            TypeError: It decorates nothing that can be a trigger task.
            InvalidConfiguration: A directive is wrong. Where a condition names tasks, the
                error comes at the first use of the configuration.
        """
        spoken = Spoken(args, options)

        def decorate(target: Any) -> Any:
            task, declaration = declare(self.app, spoken, target)
            self.workflows.declare([declaration])
            return task

        return decorate

    # ------------------------------------------------- for the floors below

    def async_result(self, task_id: str) -> Any:
        """Return the Celery result of a task."""
        return self.app.AsyncResult(task_id)

    def delivery(self, header: Mapping[str, Any], token: str) -> Delivery:
        """Return the delivery that a message's header and a token stand for.

        Raises:
            UnknownKey: The header names a manager or a storage that is not registered.
            StorageNotConfigured: It names a place where no session of this application is.
        """
        uid, manager, key = (str(header[key]) for key in ('uid', 'manager', 'storage'))
        storage = self.storage(uid, key, header.get('place'))
        if 'place' in header:
            self.check_storage(storage)
        return Delivery(self.session(uid, manager, storage), header, token)

    def check_storage(self, storage: StorageBackend) -> None:
        """Refuse changes of sessions where no worker would look for them.

        Raises:
            StorageNotConfigured: It is not the storage that the settings name.
        """
        key, url = self.settings.frozen().storage_location()
        found = storage.elsewhere or storage.url == (url or storage.default_url)
        if storage.key != key or not found:
            raise StorageNotConfigured(
                f'session {storage.uid!r} is in {storage.place}, but workers look for '
                f'sessions in {public_url(url or storage.default_url or key)}; set '
                'triggers_storage. A message names a storage by its key alone.'
            )

    def warm_up(self) -> None:
        """Import and open what a report of a worker's parent will need.

        Later a child may be forked in the middle of it, and could never import it again.

        Raises:
            TriggersError: A setting names what is not there, or the storage is down.
        """
        settings = self.settings.frozen()
        trigger_managers.get_class(settings.manager)
        self._dispatcher.runner(settings.runner)
        _ = self.storage('celery_triggers').exists

    def dispatch(self, releases: Sequence[Release]) -> int:
        """Hand released instances to their task runners; return how many were taken."""
        return self._dispatcher.dispatch(releases)

    def makes_claims(self, task_name: str) -> bool | None:
        """Tell whether deliveries of a task claim; ``None``: it is not registered here."""
        task = self.app.tasks.get(task_name)
        return None if task is None else isinstance(task, TriggerTask)

    def beat_while(self, request: object, delivery: Delivery) -> None:
        """Renew the lease of a delivery in this process for as long as its request exists."""
        beat_while(request, delivery)

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        """Store in the result backend that a task waits at a gate."""
        self._outcomes.show_waiting(task_id, uid, instance)

    @property
    def is_attended(self) -> bool:
        """Whether sessions are looked after here, in a worker; true where none runs."""
        if self.app.current_worker_task is None:
            return True
        return SweeperStep in self.app.steps['worker']

    def trigger_of(self, task: Any) -> str:
        """Return the name of the trigger task that a Celery task stands for.

        Raises:
            InvalidConfiguration: It stands for none, or for several.
        """
        return self.workflows.trigger_of(task)

    def run_here(self, manager: TriggerManager, outcome: Outcome[Any], task_id: str) -> Any:
        """Run what a change released under a task id here and now; return its result."""
        result: Any = None
        here: list[Any] = []
        others: list[Release] = []
        for release in manager._released_by(outcome):
            mine = release.instance.task_id == task_id and not release.ends
            (here if mine else others).append(release)
        if others:
            manager.storage.after_commit(lambda: self.dispatch(others))
        for release in here:
            try:
                result = run_one(self.app, release, throw=self.app.conf.task_eager_propagates)
            except EagerError as exc:
                raise exc.error from exc.error.__cause__
        step = outcome.step
        if step is not None:
            manager.storage.after_commit(lambda: manager._call_hooks(step))
        if result is None:
            result = EagerResult(task_id, None, states.IGNORED)
        return result

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        """Return how a task ended, if the result backend knows that it has."""
        return self._outcomes.of(task_id)


@contextmanager
def _blaming(setting: str, unless: object) -> Iterator[None]:
    """Name the setting in the error if a key came from there."""
    try:
        yield
    except UnknownKey as exc:
        if unless:
            raise
        raise UnknownKey(f'{exc.kind} in the setting {setting},', exc.key, exc.known) from None


def triggers_of(app: Any) -> Triggers:
    """Return ``app.triggers``, made when it is first asked for."""
    found = vars(app).get('_celery_triggers')
    if found is None:
        with _made:
            found = vars(app).get('_celery_triggers')
            if found is None:
                found = vars(app)['_celery_triggers'] = Triggers(app)
    triggers: Triggers = found
    return triggers


def current_triggers() -> Triggers:
    """Return ``app.triggers`` of the current Celery application."""
    # The application itself, not its proxy.
    return triggers_of(_state.get_current_app())


def wake_in_worker(app: Any) -> None:
    """Attach to a worker's application if it has a storage or a trigger task.

    Its worker then sweeps and renews leases.

    So does that of one whose module makes gates. An application that has none of these stays
    as it would be without this package.

    Raises:
        SystemExit: ``triggers_storage`` names a storage that cannot be used. (Celery only
            logs other exceptions of signal handlers, and the worker would drop its tasks.)
    """
    chosen = app.conf.get('triggers_storage', None)
    attached = '_celery_triggers' in vars(app) or 'celery_triggers.canvas' in sys.modules
    if not (chosen or attached) and not any(
        getattr(task, 'takes_context', False) for task in app.tasks.values()
    ):
        return
    app.steps['worker'].add(SweeperStep)
    try:
        triggers_of(app).warm_up()
    except StorageUnavailable as exc:
        logger.error('trigger tasks wait until the storage of their sessions is there: %s', exc)
    except TriggersError as exc:
        if chosen:
            raise SystemExit(f'celery_triggers: {exc}') from exc
        logger.warning('trigger tasks cannot be run here: %s', exc)


def shared_trigger_task(*args: Any, **options: Any) -> Any:
    """As ``@app.trigger_task``, for packages that do not know the application.

    The trigger task is added to every application that has been or will be made.
    """
    spoken = Spoken(args, options)

    def decorate(function: Callable[..., Any]) -> Any:
        task, declaration = declare_shared(spoken, function)

        def add(app: Any) -> None:
            triggers_of(app).workflows.declare([copy(declaration)])

        _state.connect_on_app_finalize(add)
        for app in _state._get_active_apps():  # type: ignore[attr-defined]
            if app.finalized:
                add(app)
        return task

    return decorate


if TYPE_CHECKING:

    class Celery(_Celery):
        """A Celery application as type checkers should see it, with ``task_cls`` preset."""

        triggers: Triggers

        def trigger_task(self, **options: Any) -> Callable[[Any], Any]: ...

else:

    class Celery(_Celery):
        """A Celery application whose ``task_cls`` is preset to :class:`TriggerTask`."""

        task_cls = 'celery_triggers:TriggerTask'


