"""What is sent: task runners, and the messages of those that send any.

May import ``manager`` and what lies below it.
"""

from celery_triggers.runners.runners import (
    BaseTaskRunner,
    CeleryTaskRunner,
    ThreadingTaskRunner,
    task_runners,
)

__all__ = ['BaseTaskRunner', 'CeleryTaskRunner', 'ThreadingTaskRunner', 'task_runners']
