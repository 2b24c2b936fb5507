"""What the tests of storages and of the model share: media, and an application without Celery."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from celery_triggers import runners  # noqa: F401  (registers the runners)
from celery_triggers.controller import Release
from celery_triggers.delivery import Delivery
from celery_triggers.engine.configuration import Configuration
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import FinalizingTriggerManager, TriggerManager
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.wiring import StoredOutcome
from tests.servers import CONFORMANCE_DB, redis_url

REDIS_URL = redis_url(CONFORMANCE_DB)

MEDIA = ('memory', 'redis', 'sql')


class FakeApplication:
    """``app.triggers`` without Celery: it keeps what is dispatched instead of sending it."""

    def __init__(self, configuration: Mapping[str, Any] | None = None, **settings: Any):
        self.values = {'triggers_unheard': 'ignore', **settings}
        self.settings = Settings(lambda name, default=None: self.values.get(name, default))
        self.configuration = Configuration.parse(configuration or {})
        self.releases: list[Release] = []
        self.outcomes: dict[str, StoredOutcome] = {}

    @property
    def released(self) -> list[str]:
        """The names of the instances that were dispatched, in order."""
        return [release.instance.name for release in self.releases]

    def configuration_for(self, uid: str) -> Configuration:
        return self.configuration

    def check_storage(self, storage: StorageBackend) -> None:
        pass

    def dispatch(self, releases: Sequence[Release]) -> int:
        self.releases += releases
        return len(releases)

    def stored_outcome(self, task_id: str) -> StoredOutcome | None:
        return self.outcomes.get(task_id)

    def makes_claims(self, task_name: str) -> bool | None:
        return True

    def async_result(self, task_id: str) -> Any:
        raise NotImplementedError


@dataclass
class Medium:
    """Where one test keeps its sessions."""

    key: str
    url: str
    prefix: str = field(default_factory=lambda: f'test-{secrets.token_hex(6)}')

    def application(
        self, configuration: Mapping[str, Any] | None = None, **settings: Any
    ) -> FakeApplication:
        return FakeApplication(
            configuration, **{'triggers_key_prefix': self.prefix, **settings}
        )

    def backend(
        self, uid: str = 'order:1', application: FakeApplication | None = None, **options: Any
    ) -> StorageBackend:
        application = application or self.application()
        backend: StorageBackend = storage_backends.get(
            self.key, uid, self.url, application=application, **options
        )
        return backend

    def manager(
        self,
        configuration: Mapping[str, Any] | FakeApplication | None = None,
        uid: str = 'order:1',
        *,
        finalizing: bool = False,
        **settings: Any,
    ) -> TriggerManager:
        application = (
            configuration
            if isinstance(configuration, FakeApplication)
            else self.application(configuration, **settings)
        )
        kind = FinalizingTriggerManager if finalizing else TriggerManager
        return kind(self.backend(uid, application))

    def uids(self, prefix: str = '') -> list[str]:
        class_ = storage_backends.get_class(self.key)
        return list(class_.uids(self.url, self.application().settings, prefix))

    def clear(self) -> None:
        """Leave nothing behind in a Redis that others use too."""
        if self.key == 'redis':
            client = redis.Redis.from_url(self.url)
            keys = list(client.scan_iter(f'{self.prefix}*', count=1000))
            for start in range(0, len(keys), 1000):
                client.delete(*keys[start : start + 1000])
            client.close()


def medium(key: str, folder: Any) -> Medium:
    """Return an empty medium of a kind; files go to ``folder``."""
    urls = {
        'memory': f'memory://{secrets.token_hex(6)}',
        'redis': REDIS_URL,
        'sql': f'sqlite:///{folder}/triggers.db',
    }
    return Medium(key, urls[key])


def application_of(manager: TriggerManager) -> FakeApplication:
    application = manager.storage.application
    assert isinstance(application, FakeApplication)
    return application


def delivery(manager: TriggerManager, name: str, token: str = 'token') -> Delivery:
    """Return a delivery of an instance's present attempt."""
    instance = manager.storage[name]
    incarnation = manager.storage.load().head.incarnation
    return Delivery(manager, manager.header(instance, incarnation), token)


def statuses(manager: TriggerManager) -> dict[str, str]:
    """Return ``{instance: status}``."""
    return {name: str(i.status) for name, i in manager.storage.instances.items()}


def fired(manager: TriggerManager) -> list[str]:
    """Return the triggers that were applied, in order."""
    return [record.trigger for record in manager.storage.history]


# ------------------------------------------------------------------ lost answers


def lose_answer(storage: StorageBackend) -> None:
    """Let the next commit be applied and its answer be lost."""

    def spoil(commit: Callable[[], Any]) -> Any:
        commit()
        raise StorageUnavailable('the answer was lost', outcome_unknown=True)

    _wrap_next_commit(storage, spoil)


def repeat_commit(storage: StorageBackend, between: Callable[[], Any] | None = None) -> None:
    """Let the medium's client repeat the next commit, whose first answer was lost.

    Args:
        between: Is called after the commit was applied and before it is repeated.
    """

    def spoil(commit: Callable[[], Any]) -> Any:
        commit()
        if between is not None:
            between()
        return commit()

    _wrap_next_commit(storage, spoil)


def before_commit(storage: StorageBackend, interfere: Callable[[], Any]) -> None:
    """Call ``interfere`` between the next decision and its commit."""

    def spoil(commit: Callable[[], Any]) -> Any:
        interfere()
        return commit()

    _wrap_next_commit(storage, spoil)


def _wrap_next_commit(storage: Any, spoil: Callable[[Callable[[], Any]], Any]) -> None:
    real = storage._commit

    def wrapped(commit: Any, request: Any) -> Any:
        storage._commit = real
        return spoil(lambda: real(commit, request))

    storage._commit = wrapped
