"""Filters: conditions on the kwargs of a firing, in CEL.

CEL, the Common Expression Language, always ends: it has no loops of its own, its macros over
lists share a budget of iterations, and its regular expressions take linear time. The library
is Google's own (extra ``filters``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import lru_cache
from importlib import import_module
from typing import Any
from uuid import UUID

from celery_triggers.exceptions import InvalidConfiguration

__all__ = ['check_filter', 'matches']

logger = logging.getLogger(__name__)

#: How many characters a filter may have.
MOST_CHARACTERS = 1000

#: The name under which a filter finds all kwargs: for those that CEL cannot name.
ALL_KWARGS = 'kwargs'

_UNDECLARED = re.compile(r"undeclared reference to '([A-Za-z_]\w*)")


class Filter:
    """A filter that was compiled and type-checked.

    Kwargs have no types of their own: each name that the expression uses may be of any type,
    and a mismatch is found when it is evaluated.

    Args:
        source: The expression.

    Raises:
        InvalidConfiguration: It is not a CEL expression, or not one that is true or false.
    """

    def __init__(self, source: str):
        cel = _library()
        self.source = source
        self.names: set[str] = set()
        while True:
            environment = cel.NewEnv(variables=dict.fromkeys(self.names, cel.Type.DYN))
            try:
                self._expression = environment.compile(source)
                break
            except RuntimeError as exc:
                new = set(_UNDECLARED.findall(str(exc))) - self.names
                if not new:
                    raise InvalidConfiguration(_said_of(source, str(exc))) from exc
                self.names |= new
        kind = self._expression.return_type()
        if kind not in (cel.Type.BOOL, cel.Type.DYN):
            raise InvalidConfiguration(
                f'the filter {source!r} is of the type {kind.name()}, not true or false'
            )

    def evaluate(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether kwargs match.

        Raises:
            ValueError: They are not such that it could be told.
        """
        known = {name: _plain(kwargs[name]) for name in self.names if name in kwargs}
        if ALL_KWARGS in self.names:
            known[ALL_KWARGS] = _plain(kwargs)
        try:
            value = self._expression.eval(data=known)
        except RuntimeError as exc:
            raise ValueError(_first_line(str(exc))) from exc
        if value.type().name() != 'BOOL':
            raise ValueError(_first_line(str(value.value())))
        return bool(value.value())


def check_filter(source: Any) -> str:
    """Return a filter that can be used.

    Raises:
        InvalidConfiguration: It cannot; or the extra is not installed.
    """
    if not isinstance(source, str) or not source.strip():
        raise InvalidConfiguration(f'"where" wants an expression in CEL, not {source!r}')
    if len(source) > MOST_CHARACTERS:
        raise InvalidConfiguration(
            f'a filter has {MOST_CHARACTERS} characters at most, this one has {len(source)}'
        )
    return _compiled(str.__str__(source)).source


def matches(source: str, trigger: str, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the kwargs of a firing match a filter.

    What cannot be evaluated does not match, and is logged.
    """
    try:
        return _compiled(source).evaluate(kwargs)
    except ValueError as exc:
        logger.warning(
            'a firing of %r does not match %r, which cannot be evaluated for it: %s',
            trigger, source, exc,
        )
        return False


@lru_cache(maxsize=1024)
def _compiled(source: str) -> Filter:
    return Filter(source)


def _library() -> Any:
    try:
        return import_module('cel_expr_python.cel')
    except ImportError as exc:
        raise InvalidConfiguration(
            '"where" needs the extra "filters" (Python 3.11 or later): '
            "pip install 'celery_triggers[filters]'"
        ) from exc


def _plain(value: Any) -> Any:
    """Return a value as CEL knows it: what JSON has no type for as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(member) for member in value]
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, (date, UUID)):
        return str(value)
    return value


def _said_of(source: str, message: str) -> str:
    said = f'the filter {source!r} is not understood: {_first_line(message)}'
    if 'reserved identifier' in message or 'matching overload' in message:
        said += f"; a name that CEL has taken is written {ALL_KWARGS}['<name>']"
    return said


def _first_line(message: str) -> str:
    line = message.splitlines()[0] if message else ''
    for noise in ('INVALID_ARGUMENT: ', 'UNKNOWN: ', 'INTERNAL: ', 'ERROR: ', '<input>:'):
        line = line.replace(noise, '')
    return line.removesuffix(" (in container '')").strip()
