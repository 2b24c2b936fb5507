"""Measurements that need a worker: questionnaires from the first page to the last task."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from typing import Any

import redis
from celery import Celery

RUN = os.environ.get('BENCH_RUN', uuid.uuid4().hex)

app: Any = Celery('benchmarks.workers', task_cls='celery_triggers:TriggerTask',
                  set_as_current=False)
SERVER = os.environ.get('BENCH_SERVER', 'redis://localhost:6379')
app.conf.update(
    broker_url=f'{SERVER}/14',
    triggers_storage=f'{SERVER}/15',
    triggers_manager='finalizing',
    task_ignore_result=True,
    task_default_queue=f'bench-{RUN}',
    worker_prefetch_multiplier=16,
)

workflow = app.triggers.workflow('bench:')


def _count() -> None:
    redis.Redis.from_url(f'{SERVER}/15').incr(f'bench-count-{RUN}')


@workflow.trigger_task(after=['firstPageReceived', 'questionnaireComplete'],
                       trigger_name='t_importSubject')
def import_subject(context: Any) -> dict[str, Any]:
    _count()
    return {'subject': context.uid}


@workflow.trigger_task(after=[import_subject], and_every='pageReceived',
                       trigger_name='t_importResponses')
def import_responses(context: Any) -> None:
    _count()


@workflow.trigger_task(after=[import_subject, 'pageReceived'],
                       unless=['isEmbeddedApplication'], trigger_name='t_importBrowserMetadata')
def import_browser_metadata(context: Any) -> None:
    _count()


@workflow.trigger_task(after=['sessionFinalized'], trigger_name='t_markComplete')
def mark_complete(context: Any) -> None:
    _count()


@app.task
def bare(trigger_kwargs: Any) -> None:
    """Do what the trigger tasks do, sent by hand: the baseline."""
    _count()


def questionnaires(server: str, count: int) -> tuple[float, int, float]:
    """Return the seconds for ``count`` questionnaires, their tasks, and for bare tasks."""
    global SERVER, RUN
    SERVER, RUN = server, uuid.uuid4().hex
    app.conf.update(
        broker_url=f'{server}/14', triggers_storage=f'{server}/15',
        task_default_queue=f'bench-{RUN}',
    )
    environment = {**os.environ, 'BENCH_RUN': RUN, 'BENCH_SERVER': server}
    command = [sys.executable, '-m', 'celery', '-A', 'benchmarks.workers', 'worker', '-c', '2',
               '-l', 'WARNING', '--without-gossip', '--without-mingle']
    worker = subprocess.Popen(command, env=environment, start_new_session=True)
    counter = redis.Redis.from_url(f'{server}/15')
    try:
        _wait(counter, lambda: bare.apply_async(kwargs={'trigger_kwargs': {}}), 1)
        tasks = count * 6
        seconds = _wait(counter, lambda: _fire(count), tasks)
        bare_seconds = _wait(counter, lambda: _send(tasks), tasks)
    finally:
        worker.terminate()
        worker.wait(30)
    return seconds, tasks, bare_seconds


def _fire(count: int) -> None:
    for n in range(count):
        uid = f'bench:{RUN}:{n}'
        app.triggers.fire(uid, 'firstPageReceived', {'page': 1})
        for page in range(3):
            app.triggers.fire(uid, 'pageReceived', {'page': page})
        app.triggers.fire(uid, 'questionnaireComplete')


def _send(tasks: int) -> None:
    for n in range(tasks):
        bare.apply_async(kwargs={'trigger_kwargs': {'pageReceived': {'page': n}}})


def _wait(counter: Any, start: Any, tasks: int) -> float:
    """Return the seconds from ``start()`` until so many tasks have run."""
    key = f'bench-count-{RUN}'
    counter.delete(key)
    began = time.perf_counter()
    start()
    while int(counter.get(key) or 0) < tasks:
        if time.perf_counter() - began > 300:
            raise TimeoutError(f'{counter.get(key)} of {tasks} tasks ran in 300 s')
        time.sleep(0.005)
    return time.perf_counter() - began
