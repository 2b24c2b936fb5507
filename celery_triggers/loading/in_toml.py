"""Configurations in TOML; the libraries that read it keep no lines.

A line here is that on which a statement begins, a header or a key with its value: what stands
inside a value has the line of the whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from celery_triggers.exceptions import InvalidConfiguration, MissingExtra
from celery_triggers.loading.document import Document, Lines, Path

__all__ = ['read_toml']


def read_toml(text: str) -> Document:
    """Read a TOML text.

    Raises:
        InvalidConfiguration: It is none.
        MissingExtra: Python is older than 3.11, and the extra is not installed.
    """
    toml = _library()
    text = text.replace('\r\n', '\n')
    try:
        content = toml.loads(text)
    except toml.TOMLDecodeError as exc:
        raise _refusal(str(exc), text) from exc
    return Document(content, _lines_of(text, toml))


def _library() -> Any:
    try:
        return import_module('tomllib' if sys.version_info >= (3, 11) else 'tomli')
    except ImportError as exc:
        raise MissingExtra('a configuration in TOML, before Python 3.11,', 'toml') from exc


def _refusal(message: str, text: str) -> InvalidConfiguration:
    """Return the error that has as its line what a library only says in its message."""
    said, line, column = message, text.rstrip().count('\n') + 1, ''
    match = re.fullmatch(r'(.*) \(at line (\d+), (column \d+)\)', message, re.DOTALL)
    if match:
        said, line, column = match[1], int(match[2]), f' ({match[3]})'
    return InvalidConfiguration(f'it cannot be read as TOML: {said}{column}', line=line)


def _lines_of(text: str, toml: Any) -> Lines:
    lines = Lines()
    headers = _Headers()
    table: Path = ()
    for line, statement, values in _statements(text, toml):
        if statement.startswith('['):
            table = headers.enter(values)
            for end in range(1, len(table) + 1):
                lines.setdefault(table[:end], line)
        else:
            _note(lines, table, values, line)
    return lines


def _statements(text: str, toml: Any) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the statements of a correct text with their lines and what each says alone."""
    begin, statement = 1, ''
    for number, line in enumerate(text.split('\n'), 1):
        statement += line + '\n'
        try:
            values = toml.loads(statement)
        except toml.TOMLDecodeError:
            # A list or a text of several lines: it is whole as soon as it can be read.
            continue
        if values:
            yield begin, statement.lstrip(), values
        begin, statement = number + 1, ''


def _note(lines: Lines, path: Path, value: Any, line: int) -> None:
    """Keep the line of all that stands in a value."""
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, member in members:
        way = (*path, key)
        lines.setdefault(way, line)
        _note(lines, way, member, line)


class _Headers:
    """Says which table a header opens: ``[a.b]`` may mean that in the latest ``[[a]]``."""

    def __init__(self) -> None:
        self._latest: dict[Path, int] = {}

    def enter(self, header: Any) -> Path:
        """Return the path of a table.

        Args:
            header: What the header alone is read as: ``{'a': {'b': {}}}``, or with ``[{}]``
                at its end.
        """
        path: Path = ()
        while header:
            ((key, header),) = header.items()
            path = (*path, key)
            if isinstance(header, list):
                self._latest[path] = self._latest.get(path, -1) + 1
                header = header[0]
            if path in self._latest:
                path = (*path, self._latest[path])
        return path
