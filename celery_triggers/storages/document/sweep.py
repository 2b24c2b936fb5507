"""Taking what is due at a place that keeps each session as one document.

The index holds the earliest date of each session, or one before it. What is due is in the
session's document, and is taken by whoever replaces that.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.document.index import (
    DocumentMedium,
    Entry,
    Index,
    Place,
    attempts,
)
from celery_triggers.storages.records import Due, Taken, restless_until

__all__ = ['DocumentSweep']

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DocumentSweep:
    """One pass over the due dates of a place.

    Args:
        now: The medium's time.
        limit, push, gap: See :meth:`.StorageBackend.take_due`.
    """

    medium: DocumentMedium
    index: Index
    now: int
    limit: int
    push: int
    gap: int
    _moved: dict[Place, tuple[Entry, int]] = field(default_factory=dict)

    def run(self) -> Taken:
        """Take what is due.

        Raises:
            StorageUnavailable: The medium did not answer. What was taken comes again.
        """
        calm = self._look()
        names = self.index.due_shards
        waiting = {
            (name, uid): entry
            for name, entries in zip(names, self.index.read(names), strict=True)
            for uid, entry in entries.items()
        }
        taken = Taken(self.now, [])
        for place in sorted(waiting, key=lambda place: int(waiting[place][1])):
            if waiting[place][1] > self.now:
                break
            # Entries of which nothing is due any more count too: a pass is bounded.
            if max(len(taken.entries), len(self._moved)) >= self.limit:
                taken.more = True
                break
            self._visit(place, waiting[place], taken, calm)
        self.index.move(self._moved)
        left = [self._moved.get(place, entry)[1] for place, entry in waiting.items()]
        taken.next_at = min(filter(None, left), default=None)
        return taken

    def _visit(self, place: Place, entry: Entry, taken: Taken, calm: bool) -> None:
        try:
            dues, following = self._take(place[1], self.limit - len(taken.entries), calm)
        except StorageUnavailable as exc:
            # Perhaps this session alone cannot be saved; if all is down, this fails too.
            logger.warning('what is due in session %r comes again: %s', place[1], exc)
            self.index.move({place: (entry, self.now + self.push)})
            dues, following = [], self.now + self.push
        except Exception:
            logger.exception('session %r is due and cannot be read', place[1])
            dues, following = [], self.now + self.push
        taken.entries += dues
        taken.more = taken.more or 0 < following <= self.now
        self._moved[place] = entry, following

    def _take(self, uid: str, most: int, calm: bool) -> tuple[list[Due], int]:
        """Move what is due in a session; return it, and when something is due there next."""
        for _ in attempts(f'session {uid!r}'):
            loaded = self.index.load(uid)
            if not loaded.exists:
                break
            document = loaded.document
            dues = [
                Due(uid, name, at, calm)
                for at, name in sorted((at, name) for name, at in document.dues.items())
                if at <= self.now
            ][:most]
            document.dues.update({due.name: self.now + self.push for due in dues})
            document.indexed = document.next_due
            # Saved also if nothing has changed, so that nobody still saves a version for
            # which the entry was put that goes now.
            if self.index.save(uid, loaded, remove=not document.version):
                return dues, document.indexed
        return [], 0

    def _look(self) -> bool:
        """Remember that due dates are looked at; tell whether that was done all the time."""
        text, version = self.medium.load_document(self.index.sweeps)
        taken_at, restless = json.loads(text) if text else (None, 0)
        restless = restless_until(taken_at, restless, self.now, self.gap)
        # Noted by anyone so lately that looking at nothing writes nothing.
        if taken_at is None or not 0 <= self.now - taken_at < self.gap // 4:
            note = json.dumps([self.now, restless])
            # If it is not saved, somebody else has noted it.
            self.medium.save_document(self.index.sweeps, note, version)
        return self.now >= restless
