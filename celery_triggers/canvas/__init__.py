"""Triggers in Celery's canvas: the gate, how it is applied, the package's own tasks.

May import what people write (``task``) and what lies below it; never the worker or ``app``.
"""

from celery_triggers.canvas.signature import Gate, fire, gate

__all__ = ['Gate', 'fire', 'gate']
