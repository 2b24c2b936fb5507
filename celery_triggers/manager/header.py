"""The header of a released message: where it is found, and what may be relied on in it.

A header is data that anybody can send. It is checked whole, here, before anything uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ['HEADER_KEYS', 'header_in', 'is_header']

#: The keys of a header; one that lacks any is not this package's.
HEADER_KEYS = frozenset(
    {'uid', 'incarnation', 'instance', 'task_id', 'attempt', 'manager', 'storage'}
)

#: What else may be in one, and of what type it is.
_OPTIONAL: dict[str, type] = {'claim': str, 'depth': int, 'gate': bool, 'place': str}

#: Members that may hold any text: the application chooses its sessions' names.
_FREE = frozenset({'uid'})


def header_in(request: Any) -> dict[str, Any] | None:
    """Return the header ``triggers`` of a task's request, if it has a proper one.

    Celery puts each header of a message into the request as an attribute, and all of them
    into ``request.headers``; but if there is one called ``headers``, as tracing packages make
    it, then its content alone (:class:`celery.app.task.Context`). A task that is run eagerly has
    ``request.headers`` alone.
    """
    header = getattr(request, 'triggers', None)
    if header is None:
        headers = getattr(request, 'headers', None)
        header = headers.get('triggers') if isinstance(headers, Mapping) else None
    return header if is_header(header) else None


def is_header(value: Any) -> bool:
    """Tell whether a message header has the shape of this package's."""
    return (
        isinstance(value, Mapping)
        and value.keys() >= HEADER_KEYS
        and all(isinstance(value[key], str) for key in HEADER_KEYS - {'attempt'})
        and _is(int, value['attempt'])
        and all(_is(type_, value[key]) for key, type_ in _OPTIONAL.items() if key in value)
        and all(_is_plain(key, text) for key, text in value.items() if isinstance(text, str))
    )


def _is(type_: type, value: Any) -> bool:
    return isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))


def _is_plain(key: str, text: str) -> bool:
    """Tell whether a text can be stored anywhere, and begins no line of a log."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # A lone surrogate.
        return False
    return key in _FREE or not any(character in text for character in '\n\r')
