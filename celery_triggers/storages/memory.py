"""Sessions in this process's memory: for tests, eager applications and one-process runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from celery_triggers.forks import ForkLock
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.agenda import Agenda
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.document.document import Document
from celery_triggers.storages.records import (
    Commit,
    Request,
    Row,
    Slice,
    Taken,
    Write,
    host_time,
    moment_of,
)

__all__ = ['MemoryStorageBackend']


class _Space:
    """All sessions of one name, under one lock."""

    def __init__(self) -> None:
        self.lock = ForkLock()
        self.documents: dict[str, Document] = {}
        self.agenda = Agenda()
        self.configurations: dict[str, str] = {}
        self.gates: dict[str, tuple[str, str]] = {}


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
                    space.agenda = Agenda()
                    space.configurations.clear()
                    space.gates.clear()

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
            for name, at in commit.dues.items():
                self._space.agenda.set(self.uid, name, at)
            for task_id, name in commit.gates.items():
                if name:
                    self._space.gates[task_id] = (self.uid, name)
                else:
                    self._space.gates.pop(task_id, None)
            return None

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        now = host_time()
        with self._space.lock:
            document = self._document()
            applied, row = document.write(write, now)
            if write.due is not None:
                if applied:
                    self._space.agenda.set(self.uid, write.name, moment_of(write.due, now))
                elif write.name not in document.rows:
                    self._space.agenda.set(self.uid, write.name, 0)
            return applied, row

    def _delete(self, version: str | None = None) -> bool:
        with self._space.lock:
            if version is not None and self._document().version != version:
                return False
            self._space.agenda.drop(self.uid)
            for task_id in [i for i, gate in self._space.gates.items() if gate[0] == self.uid]:
                del self._space.gates[task_id]
            return self._space.documents.pop(self.uid, None) is not None

    def _configuration(self, digest: str) -> str | None:
        return self._space.configurations.get(digest)

    def _document(self) -> Document:
        return self._space.documents.get(self.uid) or Document()

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        documents = cls._space_at(url, settings.key_prefix).documents
        return iter([uid for uid in list(documents) if uid.startswith(prefix)])

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        space = cls._space_at(url, settings.key_prefix)
        with space.lock:
            return space.agenda.take(host_time(), limit, push, gap)

    @classmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        space = cls._space_at(url, settings.key_prefix)
        with space.lock:
            return {i: space.gates[i] for i in task_ids if i in space.gates}

    @classmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        space = cls._space_at(url, settings.key_prefix)
        with space.lock:
            return iter(space.agenda.entries())
