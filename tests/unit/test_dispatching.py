"""What a runner that cannot run an instance does to it, and to whoever fired."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.registry import task_runners
from celery_triggers.runners import BaseTaskRunner, ThreadingTaskRunner
from tests.unit.test_application import make_app


@pytest.fixture
def runner() -> Iterator[Any]:
    """A runner class of which each call raises what the test says next."""

    class Broken(BaseTaskRunner):
        errors: list[BaseException] = []
        ran: list[str] = []

        def run(self, release: Any) -> None:
            self.ran.append(release.instance.name)
            if self.errors:
                raise self.errors.pop(0)

    key = f'broken-{uuid.uuid4()}'
    task_runners.register(key)(Broken)
    Broken.key = key
    yield Broken
    task_runners.unregister(key)


@pytest.fixture
def app(runner: Any) -> Any:
    app = make_app(triggers_runner=runner.key, task_always_eager=False)
    app.triggers.configure({
        't_one': {'after': ['a'], 'run': 'x'},
        't_two': {'after': ['a'], 'run': 'x'},
        't_sorry': {'after': ['t_one:failed'], 'run': 'x'},
    })
    return app


def statuses(app: Any) -> dict[str, str]:
    return {i.name: str(i.status) for i in app.triggers.session('x').storage}


@pytest.mark.parametrize('error', [
    OperationalError('refused'), ConnectionRefusedError(), RuntimeError('no result store'),
    ModuleNotFoundError("No module named 'packaging'"),
], ids=repr)
def test_a_broker_that_cannot_be_used_leaves_the_instance_scheduled(
    app: Any, runner: Any, error: Exception, caplog: Any
) -> None:
    runner.errors = [error]
    assert app.triggers.fire('x', 'a').released == ['t_one#0', 't_two#0']
    assert statuses(app) == {'t_one#0': 'scheduled', 't_two#0': 'scheduled'}
    assert "t_one#0 of session 'x' stays scheduled, its message was not sent" in caplog.text


@pytest.mark.parametrize('error', [TypeError('odd'), RecursionError()], ids=repr)
def test_anything_else_fails_that_instance_alone(app: Any, runner: Any, error: Exception) -> None:
    runner.errors = [error]
    app.triggers.fire('x', 'a')
    assert statuses(app) == {
        't_one#0': 'failed', 't_two#0': 'scheduled', 't_sorry#0': 'scheduled',
    }
    assert runner.ran == ['t_one#0', 't_sorry#0', 't_two#0']


def test_a_storage_that_goes_away_while_an_instance_is_failed_is_not_the_callers_affair(
    app: Any, runner: Any, monkeypatch: Any, caplog: Any
) -> None:
    """An error with the id of that other change would let the caller fire twice."""
    from celery_triggers.manager.delivery import Delivery

    def down(*_: Any, **__: Any) -> None:
        raise StorageUnavailable('gone')

    monkeypatch.setattr(Delivery, 'fail', down)
    runner.errors = [TypeError('odd')]
    assert app.triggers.fire('x', 'a', event_id='e').released == ['t_one#0', 't_two#0']
    assert statuses(app)['t_one#0'] == 'scheduled'
    assert 'stays scheduled: gone' in caplog.text


def test_a_soft_time_limit_of_whoever_fires_reaches_them_and_holds_up_nothing(
    app: Any, runner: Any
) -> None:
    runner.errors = [SoftTimeLimitExceeded()]
    with pytest.raises(SoftTimeLimitExceeded):
        app.triggers.fire('x', 'a')
    assert runner.ran == ['t_one#0', 't_one#0', 't_two#0']


def test_a_thread_that_does_not_start_is_not_waited_for(monkeypatch: Any) -> None:
    import threading

    app = make_app(triggers_runner='threading', task_always_eager=False)

    @app.trigger_task(after=['a'])
    def one(context: Any) -> None: ...

    def full(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, 'start', full)
        app.triggers.fire('x', 'a')
    ThreadingTaskRunner.join_all(timeout=5)
    assert statuses(app) == {'t_one#0': 'scheduled'}
