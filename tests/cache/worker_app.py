"""The application of the worker tests: its sessions are in the cache ``redis``, for 5 minutes."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from tests.django_settings import set_up
from tests.parts.servers import BROKER_DB, redis_url

#: Begins the names of everything that the test leaves in Redis.
NAME = os.environ['TRIGGERS_TEST_CACHE_APP']

set_up()

app: Any = Celery('cached', broker=redis_url(BROKER_DB), task_cls='celery_triggers:TriggerTask')
app.conf.update(
    task_default_queue=NAME,
    triggers_storage='cache://redis?timeout=300',
    triggers_key_prefix=NAME,
    triggers_dispatch_grace=0.5,
    triggers_sweep_interval=0.5,
)


@app.trigger_task(after=['go'], sessions='order:')
def first(context: Any) -> dict[str, Any]:
    context.fire('told', {'by': context.instance_name})
    return {'pid': os.getpid()}


@app.trigger_task(after=[first, 'told'], sessions='order:')
def second(context: Any) -> dict[str, Any]:
    return {'told by': context['told']['by'], 'pid': os.getpid()}
