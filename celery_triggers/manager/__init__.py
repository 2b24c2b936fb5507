"""One session under control: read, decide, commit, then follow up.

May import the storages and what lies below them; it knows no Celery.
"""

from celery_triggers.manager.managers import (
    Explanation,
    FinalizingTriggerManager,
    Firing,
    Release,
    TriggerManager,
    trigger_managers,
)

__all__ = [
    'Explanation',
    'FinalizingTriggerManager',
    'Firing',
    'Release',
    'TriggerManager',
    'trigger_managers',
]
