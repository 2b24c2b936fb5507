"""The header of a released message: what a worker may rely on before it uses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ['HEADER_KEYS', 'is_header']

#: The keys of a header; one that lacks any is not this package's.
HEADER_KEYS = frozenset(
    {'uid', 'incarnation', 'instance', 'task_id', 'attempt', 'manager', 'storage'}
)


def is_header(value: Any) -> bool:
    """Tell whether a message header has the shape of this package's."""
    return (
        isinstance(value, Mapping)
        and value.keys() >= HEADER_KEYS
        and all(isinstance(value[key], str) for key in HEADER_KEYS - {'attempt'})
        and isinstance(value['attempt'], int)
        and isinstance(value.get('claim', ''), str)
        and isinstance(value.get('depth', 0), int)
    )
