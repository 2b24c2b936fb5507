"""Due dates in memory: by name, and in the order in which they come."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from celery_triggers.storages.records import Due, Taken, restless_until

__all__ = ['Agenda']


class Agenda:
    """The due dates of one place, for storages that keep them in a process."""

    def __init__(self) -> None:
        self._dates: dict[str, dict[str, int]] = {}
        # Holds outdated dates too: they are told by not being the one in the dictionary.
        self._heap: list[tuple[int, str, str]] = []
        self._count = 0
        self._taken_at: int | None = None
        self._restless_until = 0

    def set(self, uid: str, name: str, at: int) -> None:
        """Set a due date; 0 removes it."""
        names = self._dates.setdefault(uid, {})
        known = names.pop(name, None)
        self._count -= known is not None
        if at:
            names[name] = at
            self._count += 1
            heappush(self._heap, (at, uid, name))
        if not names:
            del self._dates[uid]
        if len(self._heap) > 2 * self._count + 100:
            self._heap = [(at, uid, name) for uid, name, at in self.entries()]
            heapify(self._heap)

    def drop(self, uid: str) -> None:
        """Remove every due date of a session."""
        self._count -= len(self._dates.pop(uid, {}))

    def entries(self) -> list[tuple[str, str, int]]:
        """Return every due date: ``(uid, name, milliseconds)``."""
        return [
            (uid, name, at) for uid, names in self._dates.items() for name, at in names.items()
        ]

    def take(self, now: int, limit: int, push: int, gap: int) -> Taken:
        """Take what is due: see :meth:`.StorageBackend.take_due`."""
        self._restless_until = restless_until(self._taken_at, self._restless_until, now, gap)
        self._taken_at = now
        calm = now >= self._restless_until
        taken = Taken(now, [])
        while self._first() is not None and self._heap[0][0] <= now:
            if len(taken.entries) >= limit:
                taken.more = True
                break
            at, uid, name = heappop(self._heap)
            taken.entries.append(Due(uid, name, at, calm))
            self.set(uid, name, now + push)
        first = self._first()
        taken.next_at = first[0] if first else None
        return taken

    def _first(self) -> tuple[int, str, str] | None:
        """Return the earliest date that still stands."""
        while self._heap:
            at, uid, name = self._heap[0]
            if self._dates.get(uid, {}).get(name) == at:
                return self._heap[0]
            heappop(self._heap)
        return None
