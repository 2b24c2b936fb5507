"""A whole session as one document: for storages that load and save it whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from celery_triggers.storages.records import Commit, Request, Row, Slice, Write, apply_write


@dataclass(slots=True)
class Document:
    """Everything that a storage keeps of one session; commits are applied in place."""

    version: str = ''
    incarnation: str = ''
    head: str = ''
    entries: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    waiting: dict[str, dict[str, None]] = field(default_factory=dict)
    passing: dict[str, tuple[str, int]] = field(default_factory=dict)

    def read(self, request: Request, now: int) -> Slice:
        """Return what is asked for."""
        if request.whole:
            found = Slice(
                now,
                self.version,
                self.head,
                dict(self.entries),
                dict(self.rows),
                {trigger: list(names) for trigger, names in self.waiting.items()},
            )
        else:
            found = self._read_part(request, now)
        text, until = self.passing.get(request.passing, ('', 0))
        if until > now:
            found.entries[f'p:{request.passing}'] = text
        return found

    def _read_part(self, request: Request, now: int) -> Slice:
        waiting = {t: list(self.waiting[t]) for t in request.triggers if t in self.waiting}
        names = {*request.names, *(name for names in waiting.values() for name in names)}
        return Slice(
            now,
            self.version,
            self.head,
            {key: self.entries[key] for key in request.entries if key in self.entries},
            {name: self.rows[name] for name in names if name in self.rows},
            waiting,
        )

    def commit(self, commit: Commit, now: int) -> bool:
        """Apply a commit whole, or change nothing and return ``False``."""
        if self.version != commit.expected:
            return False
        for name, row in commit.rows.items():
            known = self.rows.get(name)
            if (known.rev if known else 0) != row.rev - 1:
                return False
        self.version, self.incarnation = commit.version, commit.incarnation
        self.head = commit.head
        for key in commit.drops:
            self.entries.pop(key, None)
        self.entries.update(commit.puts)
        self.rows.update(commit.rows)
        self._index(commit)
        self._pass(commit, now)
        return True

    def _index(self, commit: Commit) -> None:
        for trigger, name in commit.waits_removed:
            names = self.waiting.get(trigger, {})
            names.pop(name, None)
            if not names:
                self.waiting.pop(trigger, None)
        for trigger, name in commit.waits_added:
            self.waiting.setdefault(trigger, {})[name] = None

    def _pass(self, commit: Commit, now: int) -> None:
        # In the order in which they came, so the ones that are over stand first.
        while self.passing and next(iter(self.passing.values()))[1] <= now:
            del self.passing[next(iter(self.passing))]
        if commit.passing:
            event, text, seconds = commit.passing
            self.passing[event] = (text, now + seconds * 1000)

    def write(self, write: Write, now: int) -> tuple[bool, Row | None]:
        """Apply a conditional write to one row."""
        row = self.rows.get(write.name)
        if row is None or self.incarnation != write.incarnation:
            return False, None
        changed = apply_write(write, row, now)
        if changed is None:
            return False, row
        self.rows[write.name] = changed
        return True, changed
