"""Triggers in Celery's canvas: the gate, how it is applied, the package's own tasks.

May import what people write (``task``) and what lies below it; never the worker or ``app``.
The names below are imported when they are first used: a worker whose modules make no gate and
have no trigger task stays as it would be without this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_triggers.canvas.signature import Gate as Gate
    from celery_triggers.canvas.signature import fire as fire
    from celery_triggers.canvas.signature import gate as gate

__all__ = ['Gate', 'fire', 'gate']


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module('celery_triggers.canvas.signature'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
