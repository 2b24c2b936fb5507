"""Sessions in this process's memory: for tests, eager applications and one-process runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from celery_triggers.forks import ForkLock
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.document import Document
from celery_triggers.storages.records import Commit, Request, Row, Slice, Write, host_time

__all__ = ['MemoryStorageBackend']


class _Space:
    """All sessions of one name, under one lock."""

    def __init__(self) -> None:
        self.lock = ForkLock()
        self.documents: dict[str, Document] = {}
        self.configurations: dict[str, str] = {}


@storage_backends.register('memory')
class MemoryStorageBackend(StorageBackend):
    """Keeps sessions in a dictionary of this process.

    A URL ``memory://<name>`` names a space of its own, and so does each key prefix.
    """

    key = 'memory'
    _spaces: ClassVar[dict[tuple[str, str], _Space]] = {}

    def _open(self) -> None:
        self._space = self._space_at(self.url, self.settings.key_prefix)

    @classmethod
    def _space_at(cls, url: str | None, prefix: str) -> _Space:
        name = (url or '', prefix)
        if name not in cls._spaces:
            # setdefault is atomic: two threads get the same space.
            cls._spaces.setdefault(name, _Space())
        return cls._spaces[name]

    @classmethod
    def clear(cls, url: str | None = None) -> None:
        """Forget every session of a space; for tests."""
        for (place, _), space in list(cls._spaces.items()):
            if place == (url or ''):
                with space.lock:
                    space.documents.clear()
                    space.configurations.clear()

    def _read(self, request: Request) -> Slice:
        with self._space.lock:
            return self._document().read(request, host_time())

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        now = host_time()
        with self._space.lock:
            document = self._document()
            if not document.commit(commit, now):
                return document.read(request, now)
            self._space.documents[self.uid] = document
            if commit.configuration:
                self._space.configurations.setdefault(*commit.configuration)
            return None

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        with self._space.lock:
            return self._document().write(write, host_time())

    def _delete(self) -> bool:
        with self._space.lock:
            return self._space.documents.pop(self.uid, None) is not None

    def _configuration(self, digest: str) -> str | None:
        return self._space.configurations.get(digest)

    def _document(self) -> Document:
        return self._space.documents.get(self.uid) or Document()

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        documents = cls._space_at(url, settings.key_prefix).documents
        return iter([uid for uid in list(documents) if uid.startswith(prefix)])
