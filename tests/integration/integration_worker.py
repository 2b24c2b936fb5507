"""What ``celery -A integration_worker worker`` loads."""

from __future__ import annotations

from typing import Any

import integration_app
from celery.signals import task_failure

app = integration_app.from_environment()
app.set_current()
integration_app.declare_only_in_the_worker(app)


@task_failure.connect(weak=False)
def _count(sender: Any = None, task_id: str = '', **_: Any) -> None:
    integration_app.note(f'task_failure {task_id}', 'signal')
