"""What leads to the sessions of a place that keeps whole documents.

A session's document and the index cannot change together. So the order does it: whatever
leads to a session is in the index before the session's document says so, and goes after
the document no longer does. A process that dies in between leaves an entry too many,
never one too few.

What goes late must not take what has come meanwhile. Each entry has a stamp, new whenever
somebody puts it (again). Whoever is to remove it reads it *before* saving the document, and
removes it after only if it is still the same. Somebody who relies on the entry that was
read would have to save the document in between, or knows only a version of it that is
outdated then.
"""

from __future__ import annotations

import json
import random
import secrets
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.document.document import StoredDocument

__all__ = ['DocumentMedium', 'Entry', 'Found', 'Index', 'Loaded', 'Place', 'attempts']

#: Over so many documents each part of the index is spread. Never change it: entries would
#: not be found. A sweep reads every document with due dates.
DUE_SHARDS, UID_SHARDS, GATE_SHARDS = 16, 64, 64

#: How often a document is tried to be changed that others keep changing, and the pauses
#: between (seconds; each is random up to twice the one before).
MOST_ATTEMPTS, FIRST_PAUSE, MOST_PAUSE = 60, 0.002, 0.2

#: How many entries are looked at whenever one is put beside them.
LOOKED_AT = 2

#: The document and the key in it.
Place = tuple[str, str]

#: ``[stamp]`` or, of due dates, ``[stamp, milliseconds]``.
Entry = list[Any]

#: What stands at some places.
Found = dict[Place, Entry]

_compact = json.JSONEncoder(separators=(',', ':')).encode


class DocumentMedium(ABC):
    """What keeps texts under names."""

    @abstractmethod
    def load_document(self, name: str) -> tuple[str | None, Any]:
        """Return a document's text and its version, which is opaque."""

    @abstractmethod
    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        """Replace a document if it still has this version."""

    def load_documents(self, names: Sequence[str]) -> list[tuple[str | None, Any]]:
        """Load several documents; a medium that can do that at once overrides it."""
        return [self.load_document(name) for name in names]


def attempts(what: str) -> Iterator[None]:
    """Yield some times, with pauses in between.

    Raises:
        StorageUnavailable: That was not enough.
    """
    for number in range(MOST_ATTEMPTS):
        yield
        time.sleep(random.uniform(0, min(MOST_PAUSE, FIRST_PAUSE * 2**number)))
    raise StorageUnavailable(f'{what} is being changed by others all the time')


@dataclass(slots=True)
class Loaded:
    """A session's document as it was loaded.

    Attributes:
        version: The medium's, to save it with.
        exists: Whether there is a document. A session exists if its document has a version.
    """

    document: StoredDocument
    version: Any
    exists: bool


class Index:
    """The documents of one place: the sessions', and those that lead to sessions.

    Args:
        prefix: The setting ``triggers_key_prefix``.
    """

    def __init__(self, medium: DocumentMedium, prefix: str):
        self._medium = medium
        # Without colons, so that no prefix with its uids looks like another.
        self._space = quote(prefix, safe='')
        #: The document that tells when somebody last swept.
        self.sweeps = f'{self._space}:z'
        self.due_shards = [f'{self._space}:d:{number}' for number in range(DUE_SHARDS)]
        self.uid_shards = [f'{self._space}:u:{number}' for number in range(UID_SHARDS)]

    def session(self, uid: str) -> str:
        """Return the name of a session's document."""
        return f'{self._space}:s:{uid}'

    def configuration(self, digest: str) -> str:
        """Return the name of a configuration's document."""
        return f'{self._space}:c:{digest}'

    def due(self, uid: str) -> Place:
        """Return where it stands when a session is due."""
        return self.due_shards[_shard(uid, DUE_SHARDS)], uid

    def uid(self, uid: str) -> Place:
        """Return where it stands that there is a session."""
        return self.uid_shards[_shard(uid, UID_SHARDS)], uid

    def gate(self, task_id: str, uid: str) -> Place:
        """Return where it stands that a task waits at a gate of a session."""
        # The length first, so that task id and uid are told apart.
        return self.gate_shard(task_id), f'{len(task_id)}:{task_id}{uid}'

    def gate_shard(self, task_id: str) -> str:
        """Return the name of the document that holds a task's gate."""
        return f'{self._space}:g:{_shard(task_id, GATE_SHARDS)}'

    # ------------------------------------------------------------------ sessions

    def load(self, uid: str) -> Loaded:
        """Load a session's document."""
        return _loaded(*self._medium.load_document(self.session(uid)))

    def load_many(self, uids: Sequence[str]) -> list[Loaded]:
        """Load the documents of sessions."""
        found = self._medium.load_documents([self.session(uid) for uid in uids])
        return [_loaded(*one) for one in found]

    def save(self, uid: str, loaded: Loaded, *, remove: bool = False) -> bool:
        """Save a session's document; tell whether nobody else had saved it since."""
        text = None if remove else loaded.document.to_text()
        return self._medium.save_document(self.session(uid), text, loaded.version)

    # ------------------------------------------------------------------- reading

    def read(self, names: Sequence[str]) -> list[dict[str, Entry]]:
        """Return the entries of documents."""
        return [_entries(text) for text, _ in self._medium.load_documents(names)]

    def find(self, places: Iterable[Place]) -> Found:
        """Return what stands at some places."""
        wanted = list(places)
        names = list(dict.fromkeys(name for name, _ in wanted))
        found = dict(zip(names, self.read(names), strict=True))
        return {(n, key): found[n][key] for n, key in wanted if key in found[n]}

    # ------------------------------------------------------------------- writing

    def put(self, places: Iterable[Place]) -> None:
        """Let sessions be found, before their documents are saved.

        Whoever puts an entry looks after two others, and removes those of sessions that are
        gone, as processes leave them that die: so there are never many.
        """
        for name, keys in _by_name(places).items():

            def add(
                entries: dict[str, Entry], name: str = name, keys: Sequence[str] = keys
            ) -> bool:
                self._look_after(name, entries)
                for key in keys:
                    entries.pop(key, None)
                    entries[key] = [_stamp()]
                return True

            self._edit(name, add)

    def _look_after(self, name: str, entries: dict[str, Entry]) -> None:
        oldest = list(entries)[:LOOKED_AT]
        own = name in self.uid_shards
        sessions = [self.session(key if own else gate_of(key)[1]) for key in oldest]
        found = self._medium.load_documents(sessions) if sessions else []
        for key, (text, _) in zip(oldest, found, strict=True):
            entry = entries.pop(key)
            if text is not None:
                # Behind the others, so that each has its turn.
                entries[key] = entry

    def put_due(self, uid: str, at: int) -> int:
        """Let a session be found when it is due, before its document is saved.

        Returns:
            The date that stands there: an earlier one stays.
        """
        name, key = self.due(uid)
        standing = at

        def add(entries: dict[str, Entry]) -> bool:
            nonlocal standing
            standing = min(at, entries[key][1]) if key in entries else at
            entries[key] = [_stamp(), standing]
            return True

        self._edit(name, add)
        return standing

    def drop(self, known: Found) -> None:
        """Remove entries that are still as they were read."""
        self.move({place: (entry, 0) for place, entry in known.items()})

    def move(self, known: Mapping[Place, tuple[Entry, int]]) -> None:
        """Set new due dates, 0 for none, where entries are still as they were read."""
        for name, keys in _by_name(known).items():

            def change(
                entries: dict[str, Entry], name: str = name, keys: Sequence[str] = keys
            ) -> bool:
                same = [key for key in keys if entries.get(key) == known[name, key][0]]
                for key in same:
                    del entries[key]
                    if known[name, key][1]:
                        entries[key] = [_stamp(), known[name, key][1]]
                return bool(same)

            self._edit(name, change)

    def _edit(self, name: str, change: Callable[[dict[str, Entry]], bool]) -> None:
        """Change a document, unless there is nothing to change after all."""
        for _ in attempts('the index'):
            text, version = self._medium.load_document(name)
            entries = _entries(text)
            if not change(entries):
                return
            if self._medium.save_document(name, _compact(entries), version):
                return


def gate_of(key: str) -> tuple[str, str]:
    """Return the task id and the uid that are in the key of a gate."""
    length, _, rest = key.partition(':')
    return rest[: int(length)], rest[int(length) :]


def _loaded(text: str | None, version: Any) -> Loaded:
    document = StoredDocument() if text is None else StoredDocument.from_text(text)
    return Loaded(document, version, text is not None)


def _entries(text: str | None) -> dict[str, Entry]:
    entries: dict[str, Entry] = json.loads(text) if text else {}
    return entries


def _by_name(places: Iterable[Place]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, key in places:
        found.setdefault(name, []).append(key)
    return found


def _shard(key: str, shards: int) -> int:
    return zlib.crc32(key.encode(errors='surrogatepass')) % shards


def _stamp() -> str:
    return secrets.token_hex(5)
