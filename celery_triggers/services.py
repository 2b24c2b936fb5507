"""What the floors below ask of an application: its sessions, messages and results.

``app.triggers`` is what an application uses; :class:`Services` is what stands behind it, and
implements the protocol of :mod:`celery_triggers.wiring`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from celery import states
from celery.result import EagerResult

from celery_triggers.engine.configuration import Configuration
from celery_triggers.exceptions import InvalidConfiguration, StorageNotConfigured, UnknownKey
from celery_triggers.manager import Release, TriggerManager
from celery_triggers.manager.change import Outcome
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.follow_up import call_hooks, released_by
from celery_triggers.registry import storage_backends, trigger_managers
from celery_triggers.runners.dispatcher import Dispatcher
from celery_triggers.runners.runners import EagerError, run_one
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend, public_url
from celery_triggers.sweep.sweep import Sweep
from celery_triggers.task import TriggerTask
from celery_triggers.task.workflow import Workflows
from celery_triggers.wiring import StoredOutcome
from celery_triggers.worker import SweeperStep, beat_while
from celery_triggers.worker.result_backend import StoredOutcomes

__all__ = ['Services', 'blaming']

logger = logging.getLogger(__name__)


class Services:
    """One Celery application, as storages, managers, tasks and workers see it.

    Args:
        app: The Celery application.

    Attributes:
        settings: Its settings, current at any time.
        workflows: The trigger tasks that its sessions begin with.
    """

    def __init__(self, app: Any):
        self.app = app
        self.settings = Settings(self._setting, self._state_of_settings)
        self.workflows = Workflows()
        self._dispatcher = Dispatcher(app, self.settings)
        self._outcomes = StoredOutcomes(app)
        self._knows_tasks = False
        self._loading = threading.local()

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

    # ------------------------------------------------------------------ sessions

    def session(
        self,
        uid: str,
        manager: str | None = None,
        storage: str | StorageBackend | None = None,
    ) -> TriggerManager:
        """Return the trigger manager of a session, see :meth:`.Triggers.session`."""
        if not isinstance(storage, StorageBackend):
            storage = self.storage(uid, storage)
        with blaming('triggers_manager', unless=manager):
            found: TriggerManager = trigger_managers.get(
                manager or storage.settings.manager, storage
            )
        return found

    def storage(
        self, uid: str, key: str | None = None, url: str | None = None
    ) -> StorageBackend:
        """Return the storage backend of a session."""
        with blaming('triggers_storage', unless=key):
            found: StorageBackend = storage_backends.get(
                key or self.settings.frozen().storage_location()[0], uid, url, application=self
            )
        return found

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

    def new_sweep(self) -> Sweep:
        """Return a pass over what is overdue, which is still to be made."""
        key, url = self.settings.frozen().storage_location()
        return Sweep(self, storage_backends.get_class(key), url)

    # ------------------------------------------------------------- configuration

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

    def trigger_of(self, task: Any) -> str:
        """Return the name of the trigger task that a Celery task stands for.

        Raises:
            InvalidConfiguration: It stands for none, or for several.
        """
        return self.workflows.trigger_of(task)

    # ------------------------------------------------------------------ messages

    def dispatch(self, releases: Sequence[Release]) -> int:
        """Hand released instances to their task runners; return how many were taken."""
        return self._dispatcher.dispatch(releases)

    def makes_claims(self, task_name: str) -> bool | None:
        """Tell whether deliveries of a task claim; ``None``: it is not registered here."""
        task = self.app.tasks.get(task_name)
        return None if task is None else isinstance(task, TriggerTask)

    def run_here(self, manager: TriggerManager, outcome: Outcome[Any], task_id: str) -> Any:
        """Run what a change released under a task id here and now; return its result."""
        result: Any = None
        here: list[Any] = []
        others: list[Release] = []
        for release in released_by(manager, outcome):
            mine = release.instance.task_id == task_id and not release.ends
            (here if mine else others).append(release)
        if others:
            manager.storage.after_commit(lambda: self.dispatch(others))
        for release in here:
            try:
                result = run_one(self.app, release, throw=self.app.conf.task_eager_propagates)
            except EagerError as exc:
                raise exc.error from exc.error.__cause__
        draft = outcome.draft
        if draft is not None:
            manager.storage.after_commit(lambda: call_hooks(manager, draft))
        if result is None:
            result = EagerResult(task_id, None, states.IGNORED)
        return result

    def renew_while(self, request: object, delivery: Delivery) -> None:
        """Renew the lease of a delivery in this process for as long as its request exists."""
        beat_while(request, delivery)

    @property
    def is_attended(self) -> bool:
        """Whether sessions are looked after here, in a worker; true where none runs."""
        if self.app.current_worker_task is None:
            return True
        return SweeperStep in self.app.steps['worker']

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

    # ------------------------------------------------------------------- results

    def async_result(self, task_id: str) -> Any:
        """Return the Celery result of a task."""
        return self.app.AsyncResult(task_id)

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        """Return how a task ended, if the result backend knows that it has."""
        return self._outcomes.of(task_id)

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        """Store in the result backend that a task waits at a gate."""
        self._outcomes.show_waiting(task_id, uid, instance)


@contextmanager
def blaming(setting: str, unless: object) -> Iterator[None]:
    """Name the setting in the error if a key came from there."""
    try:
        yield
    except UnknownKey as exc:
        if unless:
            raise
        raise UnknownKey(f'{exc.kind} in the setting {setting},', exc.key, exc.known) from None
