"""A whole session as one document: for storages that load and save it whole."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

from celery_triggers.exceptions import TriggersError
from celery_triggers.storages.records import (
    Commit,
    Request,
    Row,
    Slice,
    Write,
    apply_write,
    moment_of,
)

#: Grows with every change of a stored document's form.
_FORM = 1

# ASCII alone, so that a medium can keep any of it, also texts that are no proper Unicode.
_compact = json.JSONEncoder(separators=(',', ':')).encode


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


@dataclass(slots=True)
class StoredDocument(Document):
    """A session's document with what leads to the session, as text and back.

    Attributes:
        dues: Its due dates by name, in milliseconds.
        gates: Which instance waits at a gate, by task id.
        indexed: The index of due dates certainly leads here at this time or earlier; 0:
            perhaps it does not.
    """

    dues: dict[str, int] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)
    indexed: int = 0

    @property
    def next_due(self) -> int:
        """The earliest due date, 0 if there is none."""
        return min(self.dues.values(), default=0)

    # ``super()`` finds no class in a dataclass with slots.

    def commit(self, commit: Commit, now: int) -> bool:
        if not Document.commit(self, commit, now):
            return False
        for name, at in commit.dues.items():
            self._set_due(name, at)
        for task_id, name in commit.gates.items():
            self.gates.pop(task_id, None)
            if name:
                self.gates[task_id] = name
        return True

    def write(self, write: Write, now: int) -> tuple[bool, Row | None]:
        applied, row = Document.write(self, write, now)
        if write.due is not None:
            if applied:
                self._set_due(write.name, moment_of(write.due, now))
            elif write.name not in self.rows:
                self.dues.pop(write.name, None)
        return applied, row

    def _set_due(self, name: str, at: int) -> None:
        self.dues.pop(name, None)
        if at:
            self.dues[name] = at

    def to_text(self) -> str:
        """Return it as ASCII text that is unlike any other, also of equal content.

        So an old text never stands for what came after it.
        """
        return _compact(
            [
                _FORM,
                secrets.token_hex(8),
                self.version,
                self.incarnation,
                self.head,
                self.entries,
                self.rows,
                {trigger: list(names) for trigger, names in self.waiting.items()},
                self.passing,
                self.dues,
                self.gates,
                self.indexed,
            ]
        )

    @classmethod
    def from_text(cls, text: str) -> StoredDocument:
        """Return what :meth:`to_text` was called on.

        Raises:
            TriggersError: Another version of this package wrote it.
        """
        form, *content = json.loads(text)
        if form != _FORM:
            raise TriggersError(
                f'another version of celery_triggers stored this session (form {form}, this '
                f'one knows {_FORM}); upgrade this process'
            )
        _, version, incarnation, head, entries, rows, waiting, passing, *found = content
        return cls(
            version,
            incarnation,
            head,
            entries,
            {name: Row(*row) for name, row in rows.items()},
            {trigger: dict.fromkeys(names) for trigger, names in waiting.items()},
            {event: (text, until) for event, (text, until) in passing.items()},
            *found,
        )
