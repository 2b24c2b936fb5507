"""``app.triggers``: what an application does with triggers, and how it comes to be there."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from datetime import datetime
from os import PathLike
from typing import TYPE_CHECKING, Any

from celery import _state
from celery.app.base import Celery as _Celery

from celery_triggers.canvas.own_tasks import add_own_tasks
from celery_triggers.engine.schema import configuration_schema
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.exceptions import (
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.forks import ForkLock
from celery_triggers.loading import configuration_in
from celery_triggers.manager import Firing, TriggerManager, pending
from celery_triggers.manager.firing import ReadyFiring, fire_all
from celery_triggers.registry import storage_backends
from celery_triggers.services import Services
from celery_triggers.storages.base import StorageBackend
from celery_triggers.sweep.sweep import MOST_AT_ONCE, SweepReport
from celery_triggers.task.decorator import Spoken, check_sessions, declare, declare_shared
from celery_triggers.task.workflow import Workflow
from celery_triggers.worker import signals
from celery_triggers.worker.bootstep import SweeperStep

__all__ = [
    'Celery', 'Triggers', 'current_services', 'services_of', 'shared_trigger_task', 'triggers_of',
]

logger = logging.getLogger(__name__)

_made = ForkLock()


class Triggers:
    """Everything that an application does with triggers: ``app.triggers``."""

    def __init__(self, app: Any):
        self._services = Services(app)
        signals.connect()
        add_own_tasks(self._services)

    def __repr__(self) -> str:
        return f'<Triggers of {self._services.app!r}>'

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
        return pending.ready(self.session(uid), trigger_name, trigger_kwargs, **options)

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
        return self._services.session(uid, manager, storage)

    def storage(
        self, uid: str, key: str | None = None, url: str | None = None
    ) -> StorageBackend:
        """Return the storage backend of a session."""
        return self._services.storage(uid, key, url)

    def sessions(self, prefix: str = '') -> Iterator[str]:
        """Yield the uids of the sessions that begin with ``prefix``, in no order."""
        settings = self._services.settings
        key, url = settings.frozen().storage_location()
        found: Iterator[str] = storage_backends.get_class(key).uids(url, settings, prefix)
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
        return self._services.new_sweep().run(limit)

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
        return Workflow(self, self._services, prefix)

    def configure(self, configuration: Mapping[str, Any], sessions: str = '') -> None:
        """Add trigger tasks, ``{name: directives}``, for the uids with a prefix.

        Raises:
            InvalidConfiguration: It was refused whole; nothing changed.
        """
        self._services.workflows.add(check_sessions(sessions), configuration)

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
            self._services.workflows.add(prefix, configuration)

    @staticmethod
    def schema() -> dict[str, Any]:
        """Return the JSON Schema of a configuration, for editors and other tools."""
        return configuration_schema()

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
            task, declaration = declare(self._services.app, spoken, target)
            self._services.workflows.declare([declaration])
            return task

        return decorate


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


def services_of(app: Any) -> Services:
    """Return what stands behind ``app.triggers``."""
    return triggers_of(app)._services


def current_services() -> Services:
    """Return what stands behind ``app.triggers`` of the current Celery application."""
    # The application itself, not its proxy.
    return services_of(_state.get_current_app())


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
    attached = '_celery_triggers' in vars(app) or 'celery_triggers.canvas.signature' in sys.modules
    if not (chosen or attached) and not any(
        getattr(task, 'takes_context', False) for task in app.tasks.values()
    ):
        return
    app.steps['worker'].add(SweeperStep)
    try:
        services_of(app).warm_up()
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
            services_of(app).workflows.declare([copy(declaration)])

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


