"""Registries: managers, storages and runners by key, also those of other packages.

A key in a setting, a session or a message is looked up here and nowhere else, so that
what is stored or sent never names code: an unknown key is an error, not an import.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from class_registry import ClassRegistry, RegistryKeyError

from celery_triggers.exceptions import UnknownKey

T = TypeVar('T')

__all__ = ['Registry', 'storage_backends', 'task_runners', 'trigger_managers']


class Registry(ClassRegistry[T], Generic[T]):
    """Classes by key: those registered in code, then those of an entry point group.

    Args:
        kind: What the classes are, for messages: ``'storage backend'``.
        group: The entry point group in which other packages offer theirs.
    """

    def __init__(self, kind: str, group: str):
        super().__init__()
        self.kind = kind
        self.group = group

    def get_class(self, key: Any) -> type[T]:
        """Return the class under ``key``.

        Raises:
            UnknownKey: There is none; the error lists the keys that there are.
        """
        try:
            return super().get_class(key)
        except RegistryKeyError:
            offered = self._offered().get(key)
            if offered is None:
                raise UnknownKey(self.kind, key, self.known()) from None
        loaded: type[T] = offered.load()
        self._registry.setdefault(key, loaded)
        return loaded

    def __contains__(self, key: Any) -> bool:
        return key in self._registry or key in self._offered()

    def known(self) -> list[str]:
        """Return every key that :meth:`get` knows, sorted."""
        return sorted({*map(str, self._registry), *self._offered()})

    def key_of(self, class_: type) -> str | None:
        """Return the key of exactly this class, or ``None``."""
        for key in self.known():
            try:
                found = self.get_class(key)
            except ImportError:
                # An entry point whose extra is not installed cannot be this class.
                continue
            if found is class_:
                return key
        return None

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


trigger_managers: Registry[Any] = Registry('trigger manager', 'celery_triggers.managers')
storage_backends: Registry[Any] = Registry('storage backend', 'celery_triggers.storages')
task_runners: Registry[Any] = Registry('task runner', 'celery_triggers.runners')
