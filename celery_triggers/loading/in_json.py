"""Configurations in JSON, with the lines that the standard library's reader does not give."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any

from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.loading.document import Document, Lines, Path

__all__ = ['read_json']

_SPACE = re.compile(r'[ \t\n\r]*')


def read_json(text: str) -> Document:
    """Read a JSON text.

    Raises:
        InvalidConfiguration: It is none, or an object has a key twice.
    """
    reader = _Reader(text)
    try:
        return Document(reader.read(), reader.lines)
    except JSONDecodeError as exc:
        raise InvalidConfiguration(
            f'it cannot be read as JSON: {exc.msg} (column {exc.colno})', line=exc.lineno
        ) from exc


class _Reader:
    """Walks through objects and arrays; what has no members the standard library reads.

    Positions are indexes into the text. Each method that reads something takes the position
    at which it begins, and returns the one behind it.
    """

    def __init__(self, text: str):
        self.lines = Lines()
        self._text = text
        self._newlines = [match.start() for match in re.finditer('\n', text)]
        self._decoder = json.JSONDecoder()

    def read(self) -> Any:
        start = self._skip_space(0)
        self.lines[()] = self._line(start)
        value, end = self._value(start, ())
        end = self._skip_space(end)
        if end < len(self._text):
            raise JSONDecodeError('Extra data', self._text, end)
        return value

    def _value(self, start: int, path: Path) -> tuple[Any, int]:
        if self._text.startswith('{', start):
            return self._object(start, path)
        if self._text.startswith('[', start):
            return self._array(start, path)
        return self._decoder.raw_decode(self._text, start)

    def _object(self, start: int, path: Path) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}

        def member(start: int) -> int:
            if not self._text.startswith('"', start):
                raise JSONDecodeError('Expecting a key in double quotes', self._text, start)
            key, end = self._decoder.raw_decode(self._text, start)
            self.lines.add_key((*path, key), self._line(start))
            colon = self._skip_space(end)
            if not self._text.startswith(':', colon):
                raise JSONDecodeError("Expecting ':'", self._text, colon)
            values[key], end = self._value(self._skip_space(colon + 1), (*path, key))
            return end

        return values, self._members(start, '}', member)

    def _array(self, start: int, path: Path) -> tuple[list[Any], int]:
        values: list[Any] = []

        def member(start: int) -> int:
            way = (*path, len(values))
            self.lines[way] = self._line(start)
            value, end = self._value(start, way)
            values.append(value)
            return end

        return values, self._members(start, ']', member)

    def _members(self, start: int, closing: str, member: Callable[[int], int]) -> int:
        """Read what stands between brackets."""
        position = self._skip_space(start + 1)
        if self._text.startswith(closing, position):
            return position + 1
        while True:
            position = self._skip_space(member(position))
            if self._text.startswith(closing, position):
                return position + 1
            if not self._text.startswith(',', position):
                raise JSONDecodeError(f"Expecting ',' or '{closing}'", self._text, position)
            position = self._skip_space(position + 1)

    def _skip_space(self, start: int) -> int:
        match = _SPACE.match(self._text, start)
        return match.end() if match else start

    def _line(self, position: int) -> int:
        return bisect_left(self._newlines, position) + 1
