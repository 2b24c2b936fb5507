"""Media: where the tests of the conformance suite keep their sessions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from celery_triggers import runners  # noqa: F401  (registers the runners)
from celery_triggers.engine.configuration import Configuration
from celery_triggers.manager import FinalizingTriggerManager, TriggerManager
from celery_triggers.manager.release import Release
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.wiring import StoredOutcome

__all__ = ['FakeApplication', 'Medium']


class FakeApplication:
    """``app.triggers`` without Celery: it keeps what is dispatched instead of sending it.

    Attributes:
        outcomes: What its result backend knows, by task id.
        shown: The gates that it was told to show as waiting: ``(task id, uid, instance)``.
    """

    def __init__(self, configuration: Mapping[str, Any] | None = None, **settings: Any):
        self.values: dict[str, Any] = {'triggers_unheard': 'ignore', **settings}
        self.settings = Settings(self.values.get)
        self.configuration = Configuration.parse(configuration or {})
        self.releases: list[Release] = []
        self.outcomes: dict[str | None, StoredOutcome] = {}
        self.shown: list[tuple[str, str, str]] = []

    @property
    def released(self) -> list[str]:
        """The names of the instances that were dispatched, in order."""
        return [release.instance.name for release in self.releases]

    def configuration_for(self, uid: str) -> Configuration:
        return self.configuration

    def check_storage(self, storage: StorageBackend) -> None:
        """Let sessions be anywhere."""

    def dispatch(self, releases: Sequence[Release]) -> int:
        self.releases += releases
        return len(releases)

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        return self.outcomes.get(task_id)

    def show_waiting(self, task_id: str, uid: str, instance: str) -> None:
        self.shown.append((task_id, uid, instance))

    def makes_claims(self, task_name: str) -> bool | None:
        return True

    def async_result(self, task_id: str) -> Any:
        raise NotImplementedError


@dataclass
class Medium:
    """A storage under test, and how tests come to an empty one.

    It is sent to other processes, so whatever it holds can be pickled. Where the defaults do
    not fit, derive from it in a module that other processes can import.

    Attributes:
        key: The storage's registry key.
        url: Where the storage is; ``{folder}`` in it stands for an empty folder, another one
            for each test. ``None`` for a storage that needs no URL.
        name: What tests call it; by default the key.
        shared: Whether processes of one host can share it. If not, no test starts any.
        settings: Further settings of the applications, ``triggers_storage_options`` say.
        big_race: Whether eight processes fire 4,000 times into one of its sessions, which
            takes a while.
        prefix: The ``triggers_key_prefix`` of one test, set when it is opened.
    """

    key: str
    url: str | None = None
    name: str = ''
    shared: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    big_race: bool = False
    prefix: str = 'triggers'

    def __post_init__(self) -> None:
        self.name = self.name or self.key

    # ------------------------------------------------------------- to override

    def prepare(self) -> None:
        """Make a process ready; called in each before the storage is imported or used."""

    def open(self, folder: Path) -> Medium:
        """Return the medium as one test uses it: empty, under a prefix of its own.

        Args:
            folder: An empty folder, for media that are files.
        """
        url = self.url and self.url.replace('{folder}', str(folder))
        return replace(self, url=url, prefix=f'test-{secrets.token_hex(6)}')

    def clear(self) -> None:
        """Leave nothing behind; called after each test. Deletes every session."""
        application = self.application()
        for uid in self.uids():
            self.backend(uid, application).delete()

    # ---------------------------------------------------------------- for tests

    @property
    def storage_class(self) -> type[StorageBackend]:
        """The storage backend under test."""
        found: type[StorageBackend] = storage_backends.get_class(self.key)
        return found

    def application(
        self, configuration: Mapping[str, Any] | None = None, **settings: Any
    ) -> FakeApplication:
        """Return an application whose sessions are here."""
        values = {'triggers_key_prefix': self.prefix, **self.settings, **settings}
        return FakeApplication(configuration, **values)

    def backend(
        self, uid: str = 'order:1', application: FakeApplication | None = None, **options: Any
    ) -> StorageBackend:
        """Return the storage of a session."""
        application = application or self.application()
        return self.storage_class(uid, self.url, application=application, **options)

    def manager(
        self,
        configuration: Mapping[str, Any] | FakeApplication | None = None,
        uid: str = 'order:1',
        *,
        finalizing: bool = False,
        **settings: Any,
    ) -> TriggerManager:
        """Return the trigger manager of a session."""
        application = (
            configuration
            if isinstance(configuration, FakeApplication)
            else self.application(configuration, **settings)
        )
        kind = FinalizingTriggerManager if finalizing else TriggerManager
        return kind(self.backend(uid, application))

    def uids(self, prefix: str = '') -> list[str]:
        """Return the uids of the sessions that are here."""
        return list(self.storage_class.uids(self.url, self.application().settings, prefix))
