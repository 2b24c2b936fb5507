"""A storage of two methods over a dictionary, in which everything can go wrong between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from celery_triggers.registry import storage_backends
from celery_triggers.storages.document import DocumentStorageBackend
from celery_triggers.storages.document.index import DocumentMedium, Index
from celery_triggers.storages.records import host_time


class Died(BaseException):
    """The process is gone."""


class Shelf:
    """What is stored, and what happens around each call of it.

    Attributes:
        calls: ``(method, name of the document)`` of each call.
        around: Is called with what the call does, and does it, or not.
        at: The time, ``None`` for the host's.
    """

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.around: Callable[[Callable[[], Any]], Any] = lambda do: do()
        self.at: int | None = None

    def load(self, name: str) -> tuple[str | None, Any]:
        self.calls.append(('load', name))

        def do() -> tuple[str | None, Any]:
            text = self.documents.get(name)
            return text, text

        found: tuple[str | None, Any] = self.around(do)
        return found

    def save(self, name: str, text: str | None, version: Any) -> bool:
        self.calls.append(('save', name))

        def do() -> bool:
            if self.documents.get(name) != version:
                return False
            self.documents.pop(name, None)
            if text is not None:
                assert text.isascii()
                self.documents[name] = text
            return True

        return bool(self.around(do))

    def kinds(self) -> list[str]:
        """Return the calls since it was last asked, documents by their kinds: ``save s``."""
        found = [f'{method} {name.split(":")[1]}' for method, name in self.calls]
        self.calls.clear()
        return found


@storage_backends.register('shelf')
class ShelfStorageBackend(DocumentStorageBackend):
    key = 'shelf'
    shelves: ClassVar[dict[str | None, Shelf]] = {}

    def _open(self) -> None:
        self.shelf = self.shelves[self.url]

    def load_document(self, name: str) -> tuple[str | None, Any]:
        return self.shelf.load(name)

    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        return self.shelf.save(name, text, version)

    def now(self) -> int:
        return host_time() if self.shelf.at is None else self.shelf.at


def index_of(shelf: Shelf) -> Index:
    """Return the index on a shelf, read past what happens around its calls."""
    return Index(_Quiet(shelf), 'triggers')



def missing_entries(index: Index, uids: Iterable[str]) -> list[str]:
    """Return what should be in the index of sessions and is not, in words."""
    wrong = []
    for uid in uids:
        document = index.load(uid).document
        if not document.version:
            continue
        if not index.find([index.uid(uid)]):
            wrong.append(f'{uid} is not listed')
        due = index.find([index.due(uid)]).get(index.due(uid))
        if document.dues and (due is None or due[1] > document.next_due):
            wrong.append(f'{uid} is due at {document.next_due}, and the index says {due}')
        wrong += [
            f'nothing leads from the task {task_id} to {uid}'
            for task_id in document.gates
            if not index.find([index.gate(task_id, uid)])
        ]
    return wrong


def superfluous_dates(index: Index, until: int) -> list[str]:
    """Return the due dates up to a time that are in the index and need not be, in words."""
    return [
        f'{uid} is not due at {at}'
        for entries in index.read(index.due_shards)
        for uid, (_, at) in entries.items()
        if at <= until and at != index.load(uid).document.next_due
    ]


class _Quiet(DocumentMedium):
    """Reads a shelf past what happens around its calls."""

    def __init__(self, shelf: Shelf):
        self.documents = shelf.documents

    def load_document(self, name: str) -> tuple[str | None, Any]:
        return self.documents.get(name), None

    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        raise NotImplementedError
