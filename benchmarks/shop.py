"""The application that is measured, and where its servers are."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

SERVER = os.environ.get('TRIGGERS_TEST_REDIS', 'redis://localhost:6379').rstrip('/')


def make_app() -> Any:
    """Return an application on a Redis broker that no worker serves."""
    app: Any = Celery('bench', broker=f'{SERVER}/14', set_as_current=False,
                      task_cls='celery_triggers:TriggerTask')
    app.conf.update(
        triggers_storage=f'{SERVER}/15', task_ignore_result=True, triggers_unheard='ignore'
    )

    @app.trigger_task(after=['a', 'b'], sessions='wait:')
    def wait(context: Any) -> None: ...

    @app.trigger_task(after=['a'], sessions='go:')
    def go(context: Any) -> None: ...

    @app.trigger_task(after=['never'], and_every='d', sessions='big:')
    def big(context: Any) -> None: ...

    @app.task
    def plain(trigger_kwargs: Any) -> None: ...

    app.bench_task = plain
    return app
