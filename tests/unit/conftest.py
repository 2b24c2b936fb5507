from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from celery_triggers.engine.configuration import Configuration
from celery_triggers.manager import Firing, TriggerManager
from celery_triggers.manager.delivery import Delivery
from celery_triggers.manager.facts import exception_facts
from celery_triggers.manager.release import Release
from celery_triggers.registry import trigger_managers
from celery_triggers.settings import Settings
from celery_triggers.storages.memory import MemoryStorageBackend


class World:
    """An application without Celery: what is released is noted and ended by the test."""

    def __init__(self, **settings: Any):
        self.settings = Settings(lambda name, default: settings.get(name, default))
        self.configuration = Configuration({})
        self.released: list[str] = []
        self.headers: dict[str, Any] = {}
        self.manager_key = 'default'
        self.uid = 'order:1'
        self.space = f'memory://{uuid.uuid4()}'

    # What managers and storages ask of an application.

    def configuration_for(self, uid: str) -> Configuration:
        return self.configuration

    def check_storage(self, storage: Any) -> None:
        pass

    def dispatch(self, releases: Sequence[Release]) -> int:
        for release in releases:
            self.released.append(release.instance.name)
            self.headers[release.instance.name] = release.header
        return len(releases)

    def stored_outcome(self, task_id: str) -> None:
        return None

    def makes_claims(self, task_name: str) -> bool:
        return True

    def async_result(self, task_id: str) -> Any:
        raise NotImplementedError

    # What tests do.

    def configure(self, configuration: dict[str, Any]) -> None:
        tasks = {name: {'run': name, **task} for name, task in configuration.items()}
        self.configuration = Configuration.parse(tasks)

    def storage(self, uid: str | None = None) -> MemoryStorageBackend:
        return MemoryStorageBackend(uid or self.uid, self.space, application=self)

    def manager(self, uid: str | None = None) -> TriggerManager:
        manager: TriggerManager = trigger_managers.get(self.manager_key, self.storage(uid))
        return manager

    def fire(self, trigger: str, kwargs: Any = None, **options: Any) -> Firing:
        return self.manager().fire(trigger, kwargs, **options)

    def delivery(self, name: str, token: str = 'token') -> Delivery:
        return Delivery(self.manager(), self.headers[name], token)

    def finish(self, name: str, result: Any = None) -> bool:
        delivery = self.delivery(name)
        return delivery.claim() and delivery.finish(result)

    def fail(self, name: str, exc: Exception | None = None) -> bool:
        delivery = self.delivery(name)
        facts = exception_facts(exc or ValueError('no'))
        return delivery.claim() and delivery.fail('raised', facts)

    def statuses(self) -> dict[str, str]:
        return {i.name: i.status.value for i in self.storage()}

    def kwargs(self, name: str) -> dict[str, Any]:
        return self.storage()[name].kwargs

    def fired(self) -> list[str]:
        return [record.trigger for record in self.storage().history]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def finalizing(world: World) -> World:
    world.manager_key = 'finalizing'
    return world
