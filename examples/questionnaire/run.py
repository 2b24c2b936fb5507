"""One run: events are fired, worker processes do the rest, and everything is counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from celery_triggers import Status
from examples.questionnaire.app import app
from examples.questionnaire.places import Places
from examples.questionnaire.respondents import Respondent, arrivals
from examples.questionnaire.rows import count_rows
from examples.workers import Workers

__all__ = ['Counts', 'forget', 'reach_servers', 'run']

#: Seconds without a new row after which the run is given up; the check tells what is missing.
_STALLED = 30.0

#: Called with how many events were fired and how many rows were written so far.
Watcher = Callable[[int, int], object]


@dataclass
class Counts:
    """What a run did.

    Attributes:
        pages: How many pages were received, those that were sent twice included.
        repeated: How many of them were recognized by their event id and not applied.
        statuses: ``{trigger task: {status: instances}}``.
        finished: ``{trigger task: [(uid, instance)]}``.
        seconds: Duration of the run by phase.
    """

    events: int = 0
    pages: int = 0
    repeated: int = 0
    statuses: dict[str, Counter[Status]] = field(default_factory=dict)
    finished: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def reach_servers() -> None:
    """Touch the storage and the broker, so that a wrong URL is told before anything starts.

    Raises:
        TriggersError: The storage does not answer, or its URL is wrong.
        OperationalError: The broker does not answer.
    """
    list(app.triggers.sessions('respondent:'))
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)


def run(places: Places, respondents: list[Respondent], workers: int, watch: Watcher) -> Counts:
    """Fire every event while the workers run, wait for their work, and count it."""
    counts = Counts()
    started = time.monotonic()
    processes = Workers(
        'examples.questionnaire.app', workers, Path(places.folder), places.name,
        places.to_environ(),
    )
    with processes.running() as running:
        _fire(places, respondents, running, counts, watch)
        counts.seconds['firing'] = time.monotonic() - started
        _wait(places, respondents, running, counts, watch)
        counts.seconds['until the last row'] = time.monotonic() - started
    _count_instances(respondents, counts)
    counts.seconds['in all'] = time.monotonic() - started
    return counts


def _fire(
    places: Places,
    respondents: list[Respondent],
    workers: Workers,
    counts: Counts,
    watch: Watcher,
) -> None:
    look = 0.0
    for event in arrivals(respondents):
        firing = app.triggers.fire(
            event.uid, event.trigger, event.kwargs, event_id=event.event_id
        )
        counts.events += 1
        if event.trigger == 'pageReceived':
            counts.pages += 1
            counts.repeated += firing.duplicate
        if time.monotonic() > look:
            workers.check()
            watch(counts.events, count_rows(places.database))
            look = time.monotonic() + 0.25


def _wait(
    places: Places,
    respondents: list[Respondent],
    workers: Workers,
    counts: Counts,
    watch: Watcher,
) -> None:
    """Wait until the workers have written what they should, or nothing any more."""
    expected = sum(respondent.rows for respondent in respondents)
    rows, changed = -1, time.monotonic()
    while time.monotonic() < changed + _STALLED:
        workers.check()
        found = count_rows(places.database)
        watch(counts.events, found)
        if found >= expected:
            return
        if found != rows:
            rows, changed = found, time.monotonic()
        time.sleep(0.1)


def _count_instances(respondents: list[Respondent], counts: Counts) -> None:
    """Ask the sessions themselves. The workers have ended, so nothing changes here."""
    for task in app.triggers.workflow('respondent:').tasks:
        counts.statuses[task], counts.finished[task] = Counter(), []
    for respondent in respondents:
        for instance in app.triggers.session(respondent.uid).storage:
            counts.statuses[instance.task][instance.status] += 1
            if instance.status is Status.FINISHED:
                counts.finished[instance.task].append((instance.uid, instance.name))


def forget(places: Places) -> None:
    """Remove the run's sessions and its queue from the servers that it used.

    What is in the run's folder goes with the folder.
    """
    if places.folder not in places.storage:
        for uid in list(app.triggers.sessions('respondent:')):
            app.triggers.delete(uid)
    if places.storage.startswith(('redis://', 'rediss://')):
        # The workflow itself, and short-lived notes of what was fired, stay behind.
        client = redis.Redis.from_url(places.storage)
        for key in client.scan_iter(f'{places.name}:*', count=1000):
            client.unlink(key)
    if places.transport is None:
        with app.connection_for_write() as connection:
            queue = app.amqp.queues[places.name](connection.default_channel)
            # A connection that does not know a binding would leave it in Redis.
            queue.declare()
            queue.delete()
            queue.exchange.delete()
