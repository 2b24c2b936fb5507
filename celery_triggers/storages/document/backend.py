"""Sessions as whole documents, for media that load and save a text under a name.

``<prefix>`` is the setting ``triggers_key_prefix``, quoted as in a URL::

    <prefix>:s:<uid>       a session
    <prefix>:c:<digest>    a configuration
    <prefix>:d:<shard>     when sessions are due, the earliest date of each
    <prefix>:u:<shard>     which sessions there are
    <prefix>:g:<shard>     which sessions have gates, by task id
    <prefix>:z             when somebody last looked at due dates

All due dates of a session are in its document, and each change is one replacement of that.
How the index is kept in step is told in :mod:`celery_triggers.storages.document.index`.
A session begins as an empty document, since nobody can tell two absences of one apart.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.settings import Settings
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.document.document import StoredDocument
from celery_triggers.storages.document.index import (
    DocumentMedium,
    Found,
    Index,
    Loaded,
    attempts,
    gate_of,
)
from celery_triggers.storages.document.sweep import DocumentSweep
from celery_triggers.storages.records import (
    Commit,
    Request,
    Row,
    Slice,
    Taken,
    Write,
    host_time,
)
from celery_triggers.wiring import Application

__all__ = ['DocumentStorageBackend']

logger = logging.getLogger(__name__)

S = TypeVar('S', bound='DocumentStorageBackend')

#: How many documents are loaded at once when all sessions are walked through.
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class _SettingsAlone:
    """What stands for the application where only its settings matter."""

    settings: Settings


class DocumentStorageBackend(StorageBackend, DocumentMedium):
    """Keeps each session as one document.

    Derive from it, give the class a ``key``, and write two methods. What the medium needs
    is in ``self.url`` and ``self.options``; :meth:`_open` may prepare it.
    """

    def __init__(self, uid: str, url: str | None = None, **options: Any):
        super().__init__(uid, url, **options)
        self._index = Index(self, self.settings.key_prefix)
        # What was read last, so that a commit on it need not load it again. A queue, since
        # threads may share a storage, and one document must not be changed by two.
        self._known: deque[Loaded] = deque(maxlen=1)

    # ----------------------------------------------------------- for authors

    @abstractmethod
    def load_document(self, name: str) -> tuple[str | None, Any]:
        """Return a document's text and its version.

        Args:
            name: Any text; uids are part of it, so it may hold slashes, line ends and NUL.

        Returns:
            The text that was last saved, ``None`` if there is none, and whatever tells
            :meth:`save_document` that nobody has saved the document since. The text itself
            will do, or a hash of it: no text of a session ever comes again.

        Raises:
            StorageUnavailable: The medium did not answer.
        """

    @abstractmethod
    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        """Replace a document if it still has the version that was loaded.

        Comparing and replacing must be one atomic act, whatever process saves at the same
        time.

        Args:
            text: ASCII; ``None`` removes the document.

        Returns:
            Whether it was replaced. If it was not, nothing has changed.

        Raises:
            StorageUnavailable: The medium did not answer. It may have been replaced.
        """

    def now(self) -> int:
        """Return the medium's time in milliseconds; here that of the host."""
        return host_time()

    # ----------------------------------------------------------- the contract

    def _read(self, request: Request) -> Slice:
        loaded = self._index.load(self.uid)
        self._known.append(loaded)
        return loaded.document.read(request, self.now())

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        known = self._last_read()
        if known is not None and known.document.version == commit.expected:
            loaded = known
        else:
            loaded, known = self._index.load(self.uid), None
        tried = False
        for _ in attempts(f'session {self.uid!r}'):
            now = self.now()
            if loaded.document.commit(commit, now):
                if not loaded.exists:
                    # The next round finds it, or a session.
                    self._index.save(self.uid, Loaded(StoredDocument(), loaded.version, False))
                else:
                    ended = self._lead_here(loaded.document, commit, now)
                    tried = True
                    if self._saved(loaded):
                        self._tidy(ended)
                        return None
            elif known is None:
                if tried and loaded.document.version == commit.version:
                    # The medium said that it had not saved what it had saved.
                    return None
                self._known.append(loaded)
                return loaded.document.read(request, now)
            loaded, known = self._index.load(self.uid), None
        raise AssertionError('attempts() ends with an error')

    def _last_read(self) -> Loaded | None:
        try:
            return self._known.pop()
        except IndexError:
            return None

    def _lead_here(self, document: StoredDocument, commit: Commit, now: int) -> Found:
        """Put into the index what leads to a session as it will be.

        Returns:
            What stands there that a commit makes superfluous.
        """
        index = self._index
        if commit.configuration:
            digest, text = commit.configuration
            self._put_configuration(digest, text)
        places = [] if commit.expected else [index.uid(self.uid)]
        waiting = [task_id for task_id, name in commit.gates.items() if name]
        places += [index.gate(task_id, self.uid) for task_id in waiting]
        if places:
            index.put(places)
        self._put_due(document, now)
        ended = commit.gates.keys() - set(waiting)
        return index.find(index.gate(task_id, self.uid) for task_id in ended)

    def _put_due(self, document: StoredDocument, now: int) -> None:
        """See to it that the index leads to a session when something in it is due."""
        following = document.next_due
        # A sweep has been there, if the date is past; else the entry may have been lost.
        if following and not now < document.indexed <= following:
            document.indexed = self._index.put_due(self.uid, following)

    def _put_configuration(self, digest: str, text: str) -> None:
        name = self._index.configuration(digest)
        known, version = self.load_document(name)
        if known is None:
            # If it is not saved, somebody else has saved the same.
            self.save_document(name, text, version)

    def _saved(self, loaded: Loaded, *, remove: bool = False) -> bool:
        """Save the session's document; tell whether nobody else had saved it since."""
        try:
            return self._index.save(self.uid, loaded, remove=remove)
        except StorageUnavailable as exc:
            exc.outcome_unknown = True
            raise

    def _tidy(self, ended: Found) -> None:
        """Remove from the index what leads to a session no longer."""
        try:
            self._index.drop(ended)
        except StorageUnavailable as exc:
            # The change is made, and what is left over does no harm.
            logger.info('the index of session %r keeps superfluous entries: %s', self.uid, exc)

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        for _ in attempts(f'session {self.uid!r}'):
            loaded = self._index.load(self.uid)
            document, now = loaded.document, self.now()
            had_date = write.name in document.dues
            applied, row = document.write(write, now)
            if not applied and had_date == (write.name in document.dues):
                return applied, row
            self._put_due(document, now)
            if self._saved(loaded):
                return applied, row
        raise AssertionError('attempts() ends with an error')

    def _delete(self, version: str | None = None) -> bool:
        index = self._index
        for _ in attempts(f'session {self.uid!r}'):
            loaded = index.load(self.uid)
            document = loaded.document
            if not document.version or version not in (None, document.version):
                return False
            gates = (index.gate(task_id, self.uid) for task_id in document.gates)
            ended = index.find([index.uid(self.uid), index.due(self.uid), *gates])
            if self._saved(loaded, remove=True):
                self._tidy(ended)
                return True
        raise AssertionError('attempts() ends with an error')

    def _configuration(self, digest: str) -> str | None:
        return self.load_document(self._index.configuration(digest))[0]

    # ------------------------------------------------------ the place as a whole

    @classmethod
    def _at(cls: type[S], url: str | None, settings: Settings) -> S:
        """Return an instance for a place; its uid means nothing."""
        return cls('celery_triggers', url, application=cast(Application, _SettingsAlone(settings)))

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        index = cls._at(url, settings)._index
        found = (uid for entries in index.read(index.uid_shards) for uid in entries)
        for uid, loaded in _each(index, (uid for uid in found if uid.startswith(prefix))):
            if loaded.document.version:
                yield uid

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        place = cls._at(url, settings)
        return DocumentSweep(place, place._index, place.now(), limit, push, gap).run()

    @classmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        index = cls._at(url, settings)._index
        shards = list(dict.fromkeys(index.gate_shard(task_id) for task_id in task_ids))
        keys = {gate_of(key) for entries in index.read(shards) for key in entries}
        found: dict[str, tuple[str, str]] = {}
        wanted = [(task_id, uid) for task_id, uid in keys if task_id in task_ids]
        for (task_id, uid), loaded in zip(
            wanted, index.load_many([uid for _, uid in wanted]), strict=True
        ):
            if task_id in loaded.document.gates:
                found[task_id] = uid, loaded.document.gates[task_id]
        return found

    @classmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        index = cls._at(url, settings)._index
        found = (uid for entries in index.read(index.due_shards) for uid in entries)
        for uid, loaded in _each(index, found):
            for name, at in loaded.document.dues.items():
                yield uid, name, at


def _each(index: Index, uids: Iterator[str]) -> Iterator[tuple[str, Loaded]]:
    """Yield sessions with their documents, of which so many are loaded at once."""
    while some := list(islice(uids, _AT_ONCE)):
        yield from zip(some, index.load_many(some), strict=True)
