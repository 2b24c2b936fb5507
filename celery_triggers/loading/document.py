"""What a file holds, and on which lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from celery_triggers.engine.forms import check_members, parse_condition
from celery_triggers.engine.task_config import DIRECTIVES
from celery_triggers.exceptions import InvalidConfiguration

__all__ = ['Document', 'Lines', 'Path']

#: The way to a value: keys of objects and positions in lists.
Path = tuple[str | int, ...]


class Lines(dict[Path, int]):
    """The lines on which values begin; a member of an object begins with its key."""

    def add_key(self, path: Path, line: int) -> None:
        """Keep the line of a member of an object.

        Raises:
            InvalidConfiguration: Its key is given twice. Else one of the values would be
                dropped, and nobody would hear of it.
        """
        if path in self:
            names = [key for key in path[:2] if isinstance(key, str)]
            task, directive, *_ = (*names, None, None)
            raise InvalidConfiguration(
                f'the key {path[-1]!r} is given twice, first on line {self[path]}',
                task=task,
                directive=directive,
                line=line,
            )
        self[path] = line

    def nearest(self, path: Path) -> int | None:
        """Return the line of a value, or of the innermost around it that has one."""
        while path and path not in self:
            path = path[:-1]
        return self.get(path)


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Attributes:
        content: Its values, as the library of its format reads them.
        lines: Where they stand, as far as that is known.
    """

    content: Any
    lines: Lines

    @property
    def configuration(self) -> Any:
        """The content without what it says to editors: the address of a schema."""
        if isinstance(self.content, dict) and isinstance(self.content.get('$schema'), str):
            return {name: value for name, value in self.content.items() if name != '$schema'}
        return self.content

    def line_of(self, error: InvalidConfiguration) -> int | None:
        """Return the line of what an error is about, or ``None`` if that is not known."""
        return self.lines.nearest(self._path_of(error))

    def _path_of(self, error: InvalidConfiguration) -> Path:
        if error.task is None:
            return ()
        directives = self.content.get(error.task)
        if not isinstance(directives, Mapping):
            return (error.task,)
        directive = error.directive or ''
        for written in (directive, DIRECTIVES.get(directive, directive)):
            if written in directives:
                inside = _innermost(directives[written], str(error.__cause__))
                return (error.task, written, *inside)
        # It is the whole that is wrong, or a directive that is missing.
        return (error.task,)


def _innermost(value: Any, complaint: str) -> Path:
    """Return the way to the innermost member of a condition to which a complaint applies."""
    for way, member in _members(value):
        if _complaint_about(member) == complaint:
            return (*way, *_innermost(member, complaint))
    return ()


def _members(condition: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(condition, list):
        for number, member in enumerate(condition):
            yield (number,), member
    elif isinstance(condition, Mapping):
        for key in ('any', 'all', 'of'):
            for way, member in _members(condition.get(key)):
                yield (key, *way), member


def _complaint_about(member: Any) -> str | None:
    try:
        check_members(parse_condition([member]))
    except InvalidConfiguration as exc:
        return str(exc)
    return None
