"""A trigger manager that says what was fired."""

from __future__ import annotations

import logging
from typing import Any

from celery_triggers import TriggerManager

logger = logging.getLogger('triggers_shelf')


class NotingTriggerManager(TriggerManager):
    """Logs each firing with what it released; ``triggers_manager='noting'``."""

    def _post_fire(self, trigger_name: str, tasks_scheduled: list[Any]) -> None:
        names = [instance.name for instance in tasks_scheduled]
        logger.info('%s: %s released %s', self.uid, trigger_name, names)
