"""What the racing processes do; a module of its own, which they can import."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery

from celery_triggers.registry import task_runners
from celery_triggers.runners import BaseTaskRunner
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium

#: No instance of it is ever released.
HELD = {'t_each': {'after': ['never'], 'andEvery': 'item', 'run': 'x'}}
#: Each instance of it is released at once.
RELEASED = {'t_each': {'andEvery': 'item', 'run': 'x'}}

_spawn = multiprocessing.get_context('spawn')


class Track:
    """Processes that race together, race after race: starting them costs more than most races.

    Args:
        number: How many.
    """

    def __init__(self, number: int):
        self._ready = _spawn.Barrier(number)
        self._ends: list[Any] = []
        self._racers: list[Any] = []
        for index in range(number):
            here, there = _spawn.Pipe()
            racer = _spawn.Process(target=_attend, args=(index, self._ready, there), daemon=True)
            racer.start()
            there.close()
            self._ends.append(here)
            self._racers.append(racer)

    def race(
        self, racer: Callable[..., Any], medium: Medium, *args: Any, timeout: float = 280
    ) -> list[Any]:
        """Run ``racer(index, ready, medium, *args)`` in each; return what each returned."""
        for end in self._ends:
            end.send((racer, medium, args))
        reported = [_heard(end, timeout) for end in self._ends]
        # Whoever meets an error leaves a broken barrier to the others.
        self._ready.reset()
        errors = [error for error, _ in reported if error]
        assert not errors, errors
        return [value for _, value in reported]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for racer in self._racers:
            racer.join(5)
            racer.terminate()


def _heard(end: Any, timeout: float) -> tuple[str, Any]:
    try:
        return end.recv() if end.poll(timeout) else (f'no answer in {timeout} seconds', None)
    except EOFError:
        return 'the process has died', None


def _attend(index: int, ready: Any, end: Any) -> None:
    while True:
        try:
            racer, medium, args = end.recv()
        except EOFError:
            return
        try:
            medium.prepare()
            end.send(('', racer(index, ready, medium, *args)))
        except BaseException as exc:
            ready.abort()
            end.send((repr(exc), None))


def race_threads(
    racer: Callable[..., Any], number: int, medium: Medium, *args: Any
) -> list[Any]:
    """Run ``racer(index, ready, medium, *args)`` in so many threads of this process."""
    ready = threading.Barrier(number)
    results: list[Any] = []
    racers = [
        threading.Thread(target=lambda i=index: results.append(racer(i, ready, medium, *args)))
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
    app: Any = Celery('race', broker='memory://', set_as_current=False)
    app.conf.update(
        medium.settings,
        triggers_storage=medium.url or medium.key,
        triggers_key_prefix=medium.prefix,
        triggers_runner='race-nothing',
    )
    app.triggers.configure(RELEASED)
    NothingRunner.handed.clear()
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
