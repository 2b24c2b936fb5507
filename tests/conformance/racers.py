"""What the racing processes do; a module of its own, which they can import."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery

from celery_triggers.registry import task_runners
from celery_triggers.runners import BaseTaskRunner
from tests.support import Medium, delivery

#: No instance of it is ever released.
HELD = {'t_each': {'after': ['never'], 'andEvery': 'item', 'run': 'x'}}
#: Each instance of it is released at once.
RELEASED = {'t_each': {'andEvery': 'item', 'run': 'x'}}

_spawn = multiprocessing.get_context('spawn')


def race(
    racer: Callable[..., Any], number: int, *args: Any, threads: bool = False, timeout: float = 280
) -> list[Any]:
    """Run ``racer(index, ready, *args)`` so many times at once; return what each returned.

    Args:
        threads: In threads of this process instead of processes.
    """
    if threads:
        return _race_threads(racer, number, args)
    ready, results = _spawn.Barrier(number), _spawn.Queue()
    racers = [
        _spawn.Process(target=_report, args=(racer, index, ready, results, args), daemon=True)
        for index in range(number)
    ]
    for process in racers:
        process.start()
    try:
        reported = [results.get(timeout=timeout) for _ in racers]
    finally:
        for process in racers:
            process.join(5)
            process.terminate()
    errors = [error for error, _ in reported if error]
    assert not errors, errors
    return [value for _, value in reported]


def _report(racer: Any, index: int, ready: Any, results: Any, args: Sequence[Any]) -> None:
    try:
        results.put(('', racer(index, ready, *args)))
    except BaseException as exc:
        ready.abort()
        results.put((repr(exc), None))


def _race_threads(racer: Any, number: int, args: Sequence[Any]) -> list[Any]:
    ready = threading.Barrier(number)
    results: list[Any] = []
    racers = [
        threading.Thread(target=lambda i=index: results.append(racer(i, ready, *args)))
        for index in range(number)
    ]
    for thread in racers:
        thread.start()
    for thread in racers:
        thread.join()
    assert len(results) == number
    return results


def fire_many(index: int, ready: Any, medium: Medium, count: int) -> list[str]:
    """Fire items of one's own; return the names of the instances that they made."""
    manager = medium.manager(HELD)
    ready.wait(60)
    made = []
    for number in range(count):
        made += manager.fire('item', {'racer': index, 'n': number}).created
    return made


def fire_and_run(index: int, ready: Any, medium: Medium, count: int) -> list[str]:
    """Fire items through a Celery application; return what its runner was handed."""
    app = Celery('race', broker='memory://', set_as_current=False)
    app.conf.update(
        triggers_storage=medium.url,
        triggers_key_prefix=medium.prefix,
        triggers_runner='race-nothing',
    )
    app.triggers.configure(RELEASED)
    ready.wait(60)
    for number in range(count):
        app.triggers.fire('order:1', 'item', {'racer': index, 'n': number})
    return NothingRunner.handed


@task_runners.register('race-nothing')
class NothingRunner(BaseTaskRunner):
    """Does nothing but note what it is handed."""

    handed: list[str] = []

    def run(self, release: Any) -> None:
        self.handed.append(release.instance.name)


def fire_own_trigger(index: int, ready: Any, medium: Medium, joins: int) -> list[str]:
    """Fire one's own trigger into many sessions; return the sessions that it released."""
    configuration = {'t_join': {'after': [f'part{i}' for i in range(4)], 'run': 'x'}}
    application = medium.application(configuration)
    managers = [medium.manager(application, f'join:{number}') for number in range(joins)]
    ready.wait(60)
    return [m.uid for m in managers if m.fire(f'part{index}').released]


def fire_same_event(_index: int, ready: Any, medium: Medium, events: int) -> list[int]:
    """Fire the same events as the others; return those that were not duplicates."""
    manager = medium.manager(HELD)
    ready.wait(60)
    return [
        number
        for number in range(events)
        if not manager.fire('item', {'n': number}, event_id=f'e{number}').duplicate
    ]


def claim_all(index: int, ready: Any, medium: Medium, names: list[str]) -> list[str]:
    """Claim what the others claim too; return what was granted."""
    manager = medium.manager(RELEASED)
    deliveries = [delivery(manager, name, f'token {index}') for name in names]
    ready.wait(60)
    return [one.name for one in deliveries if one.claim()]


def finish_all(index: int, ready: Any, medium: Medium, names: list[str]) -> list[str]:
    """Report the success of what the others report too; return what counted."""
    manager = medium.manager(RELEASED)
    deliveries = [delivery(manager, name, '') for name in names]
    ready.wait(60)
    return [one.name for one in deliveries if one.finish({'by': index})]
