"""What people write: the task class, its context, the decorator, workflows.

May import ``manager`` and what lies below it; what it needs of a worker comes by ``app.triggers``.
"""

from celery_triggers.task.context import TaskContext
from celery_triggers.task.task import TriggerTask, current_context

__all__ = ['TaskContext', 'TriggerTask', 'current_context']
