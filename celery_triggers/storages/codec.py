"""How records become text, and text records again.

Payloads (kwargs, results, metadata) go through the kombu serializer of
``triggers_serializer``, so that whatever Celery can send can be stored. JSON text stays
readable; other formats are stored as ``<serializer>:<base64>``.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from kombu import serialization
from kombu.exceptions import DecodeError, EncodeError
from kombu.serialization import registry  # type: ignore[attr-defined]
from kombu.utils.json import JSONEncoder, object_hook

__all__ = ['Codec']

_ENCODER = JSONEncoder(separators=(',', ':'))
_SORTING_ENCODER = JSONEncoder(separators=(',', ':'), sort_keys=True)


@lru_cache(maxsize=64)
def codec_for(serializer: str, accept: tuple[str, ...]) -> Codec:
    """Return the codec of a serializer; each is made once."""
    return Codec(serializer, accept)


class Codec:
    """Encodes and decodes stored records.

    Args:
        serializer: The name of a kombu serializer.
        accept: The content types or serializer names that may be decoded.
    """

    def __init__(self, serializer: str = 'json', accept: Iterable[str] = ('json',)):
        self.serializer = serializer
        self.accept = serialization.prepare_accept_content(list(accept))

    def dumps(self, value: Any) -> str:
        """Return ``value`` as text.

        Raises:
            kombu.exceptions.EncodeError: The serializer cannot take it.
        """
        if self.serializer == 'json':
            try:
                return _ENCODER.encode(value)
            except (TypeError, ValueError, RecursionError) as exc:
                raise EncodeError(str(exc)) from exc
        _, _, data = serialization.dumps(value, self.serializer)
        raw = data.encode() if isinstance(data, str) else data
        return f'{self.serializer}:{base64.b64encode(raw).decode()}'

    def loads(self, text: str) -> Any:
        """Return what :meth:`dumps` was given.

        Raises:
            kombu.exceptions.ContentDisallowed: ``accept_content`` does not allow the
                serializer that the text was written with.
        """
        if text[:1] in '{[':
            if '"__type__"' in text:
                return json.loads(text, object_hook=object_hook)
            return json.loads(text)
        serializer, _, data = text.partition(':')
        content_type, encoding = self._content(serializer)
        return serialization.loads(
            base64.b64decode(data), content_type, encoding, accept=self.accept
        )

    @staticmethod
    def _content(serializer: str) -> tuple[str, str]:
        content_type, encoding, _ = registry._encoders[serializer]
        return content_type, encoding

    def copy(self, value: Any) -> Any:
        """Return ``value`` as a reader of the storage will see it, sharing nothing.

        Raises:
            kombu.exceptions.EncodeError: It cannot be written, or not be read back.
        """
        text = self.dumps(value)
        try:
            return self.loads(text)
        except (ValueError, TypeError, LookupError, DecodeError) as exc:
            raise EncodeError(f'it cannot be read back: {exc}') from exc

    def digest(self, *values: Any) -> str:
        """Return a short hash of values that is the same for equal content."""
        try:
            text = _SORTING_ENCODER.encode(values)
        except (TypeError, ValueError):
            text = self.dumps(list(values))
        return hashlib.sha256(text.encode()).hexdigest()[:24]
