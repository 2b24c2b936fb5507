"""What is kept of an exception, for people, in a form that every serializer takes."""

from __future__ import annotations

import traceback as tracebacks
from collections.abc import Callable, Mapping
from typing import Any

from kombu.exceptions import EncodeError

from celery_triggers.exceptions import get_context
from celery_triggers.storages.codec import Codec

__all__ = ['exception_facts', 'lost_worker', 'storable']


def exception_facts(
    exc: BaseException | None, traceback: str | None = None
) -> dict[str, Any]:
    """Return what is kept of an exception: type, message, traceback and context."""
    if exc is None:
        return {'type': '', 'message': '', 'traceback': traceback or '', 'context': {}}
    if traceback is None:
        traceback = ''.join(tracebacks.format_exception(exc))
    return {
        'type': type(exc).__qualname__,
        'message': _printable(exc, str),
        'traceback': traceback,
        'context': get_context(exc),
    }


def lost_worker(message: str) -> dict[str, Any]:
    """Return what is kept of the loss of a worker, in the shape of an exception."""
    return {**exception_facts(None), 'type': 'WorkerLostError', 'message': message}


def storable(codec: Codec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts for people; what cannot be serialized is kept as its repr."""
    kept: dict[str, Any] = {}
    for key, value in facts.items():
        try:
            kept[str(key)] = codec.copy([value])[0]
        except EncodeError:
            kept[str(key)] = _printable(value)
    return kept


def _printable(value: object, how: Callable[[Any], str] = repr) -> str:
    """Return the text of a value, also of one that cannot print itself."""
    try:
        return how(value)
    except Exception:  # noqa: BLE001
        # Whatever it raises, it must not hide how a run ended.
        return f'<unprintable {type(value).__qualname__}>'
