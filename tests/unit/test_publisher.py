"""Messages are made where they are released, and sent without holding anybody up."""

from __future__ import annotations

import gc
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import ConnectionForced, PreconditionFailed
from celery import Celery, signals
from kombu.exceptions import OperationalError
from redis.exceptions import ReadOnlyError, ResponseError

from celery_triggers.runners import broker_thread as publisher
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.wiring import services_of
from tests.parts.waiting import eventually


@pytest.fixture
def app() -> Iterator[Any]:
    """An application whose messages go to a broker in memory, which nobody reads."""
    app: Any = Celery(
        'publishing', broker='memory://', set_as_current=False,
        task_cls='celery_triggers:TriggerTask',
    )
    app.conf.update(
        triggers_storage='memory://publishing', triggers_unheard='ignore',
        # The broker in memory is that of the whole process.
        task_default_queue=f'publishing-{uuid.uuid4().hex}',
    )

    @app.trigger_task(after=['a'], name='one')
    def one(context: Any) -> None: ...

    @app.trigger_task(after=['a'], name='two')
    def two(context: Any) -> None: ...

    @app.trigger_task(after=['b'], name='three')
    def three(context: Any) -> None: ...

    yield app
    MemoryStorageBackend.clear('memory://publishing')
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete(app.conf.task_default_queue)


def sent(app: Any) -> list[str]:
    """Take the names of the tasks whose messages are in the queue."""
    names = []
    with app.connection_for_read() as connection:
        channel, queue = connection.default_channel, app.conf.task_default_queue
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            names.append(message.headers['task'])
    return sorted(names)


def sends(app: Any, uid: str = 'x') -> dict[str, int]:
    return {i.name: i.record.sends for i in app.triggers.session(uid).storage}


def break_wire(monkeypatch: Any, broken: Any) -> list[int]:
    """Call ``broken`` instead of the step that puts a message on the wire; count the calls."""
    calls: list[int] = []
    real = publisher._Connection._open

    def open_(self: Any) -> None:
        real(self)
        original = self._producer._publish

        def publish(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return broken(original, *args, **kwargs)

        if self._producer.__dict__.get('_publish') is None:
            self._producer._publish = publish

    monkeypatch.setattr(publisher._Connection, '_open', open_)
    return calls


def test_what_is_released_is_sent_and_noted(app: Any) -> None:
    assert app.triggers.fire('x', 'a').released == ['t_one#0', 't_two#0']
    assert sent(app) == ['one', 'two']
    assert sends(app) == {'t_one#0': 1, 't_two#0': 1}


def test_signals_and_routers_run_in_the_thread_that_fires(app: Any) -> None:
    threads: list[Any] = []

    def before(**_: Any) -> None:
        threads.append(threading.current_thread())

    signals.before_task_publish.connect(before)
    try:
        app.conf.task_routes = (lambda *_, **__: threads.append(threading.current_thread()),)
        app.triggers.fire('x', 'b')
    finally:
        signals.before_task_publish.disconnect(before)
    assert threads
    assert set(threads) == {threading.current_thread()}


def test_a_signal_handler_may_fire(app: Any) -> None:
    def audit(sender: Any = None, **_: Any) -> None:
        if sender != 'three':
            app.triggers.fire('audit', 'b', event_id='once')

    signals.before_task_publish.connect(audit)
    try:
        began = time.monotonic()
        app.triggers.fire('x', 'a')
        assert time.monotonic() - began < publisher.LIMIT
    finally:
        signals.before_task_publish.disconnect(audit)
    assert sent(app) == ['one', 'three', 'two']


def test_a_message_that_is_refused_stops_no_other(app: Any, monkeypatch: Any, caplog: Any) -> None:
    def picky(original: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
        if 't_one#0' in repr(args):
            raise PreconditionFailed('inequivalent arg')
        return original(body, *args, **kwargs)

    break_wire(monkeypatch, picky)
    app.triggers.fire('x', 'a')
    assert sent(app) == ['two']
    assert not services_of(app)._dispatcher.publisher.paused
    assert 'the broker does not take its message: PreconditionFailed' in caplog.text
    assert sends(app) == {'t_one#0': 1, 't_two#0': 1}, 'it is offered later each time'
    app.triggers.fire('y', 'b')
    assert sent(app) == ['three']


def test_a_connection_that_turns_out_to_be_dead_is_made_anew(app: Any, monkeypatch: Any) -> None:
    failures = [ConnectionResetError()]

    def dead_once(original: Any, *args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args, **kwargs)

    calls = break_wire(monkeypatch, dead_once)
    app.triggers.fire('x', 'b')
    assert len(calls) == 2
    assert sent(app) == ['three']


def test_a_broker_that_is_down_is_left_alone_for_a_while(
    app: Any, monkeypatch: Any, caplog: Any
) -> None:
    tries: list[int] = []

    def refuse(self: Any) -> None:
        tries.append(1)
        raise publisher.BrokerDown from ConnectionRefusedError('refused')

    with monkeypatch.context() as patched:
        patched.setattr(publisher._Connection, '_open', refuse)
        for uid in 'xyz':
            assert app.triggers.fire(uid, 'b').released == ['t_three#0']
    assert len(tries) == 1
    assert sends(app) == {'t_three#0': 0}
    assert 'released tasks stay scheduled and are sent later' in caplog.text
    services_of(app)._dispatcher.publisher._paused_until = 0
    app.triggers.fire('w', 'b')
    assert sent(app) == ['three']


def test_a_broker_that_hangs_holds_nobody_up_for_long(app: Any, monkeypatch: Any) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(publisher, 'LIMIT', 0.3)
    monkeypatch.setattr(publisher, 'STUCK', 0.2)

    def hang(original: Any, *args: Any, **kwargs: Any) -> Any:
        go_on.wait(20)
        return original(*args, **kwargs)

    break_wire(monkeypatch, hang)
    began = time.monotonic()
    app.triggers.fire('x', 'b')
    first = time.monotonic() - began
    for _ in range(5):
        app.triggers.fire('y', 'c')
    app.triggers.fire('y', 'b')
    assert first < 2
    assert time.monotonic() - began - first < 1, 'nobody else waits'
    go_on.set()
    eventually(
        lambda: sends(app) == {'t_three#0': 1}, 'what was sent late is noted all the same', 10
    )


def test_jobs_that_wait_behind_others_are_no_sign_of_a_broker_that_is_down(
    app: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(publisher, 'LIMIT', 0.2)
    monkeypatch.setattr(publisher, 'STUCK', 0.15)

    def slow(original: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return original(*args, **kwargs)

    break_wire(monkeypatch, slow)
    threads = [
        threading.Thread(target=app.triggers.fire, args=(f's:{n}', 'a')) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not services_of(app)._dispatcher.publisher.paused
    found: list[str] = []

    def all_were_sent() -> bool:
        found.extend(sent(app))
        return len(found) >= 16

    eventually(all_were_sent, 'all are sent', 20)


def test_a_thread_that_never_runs_is_said(app: Any, monkeypatch: Any, caplog: Any) -> None:
    """Under uWSGI without enable-threads, say."""
    monkeypatch.setattr(publisher, 'LIMIT', 0.1)
    monkeypatch.setattr(threading.Thread, 'start', lambda self: None)
    app.triggers.fire('x', 'b')
    assert 'uWSGI needs enable-threads' in caplog.text
    assert sends(app) == {'t_three#0': 0}


def test_an_apply_async_of_ones_own_that_sends_nothing_is_not_noted_as_sent(app: Any) -> None:
    app.tasks['three'].__class__.apply_async = lambda *_, **__: None
    app.triggers.fire('x', 'b')
    assert sends(app) == {'t_three#0': 0}


def test_a_router_that_is_down_leaves_the_instance_scheduled(app: Any) -> None:
    def router(*_: Any, **__: Any) -> None:
        raise OperationalError('no database')

    app.conf.task_routes = (router,)
    app.triggers.fire('x', 'b')
    (instance,) = app.triggers.session('x').storage
    assert str(instance.status) == 'scheduled'


def test_the_result_backend_is_not_told(app: Any, monkeypatch: Any) -> None:
    """It may be down, and takes its time to say so."""
    app.conf.result_backend = 'cache+memory://'
    told: list[str] = []
    monkeypatch.setattr(
        type(app.backend), 'on_task_call', lambda self, _, task_id: told.append(task_id)
    )
    backend = app.backend
    app.triggers.fire('x', 'b')
    assert told == []
    assert app.backend is backend
    assert sent(app) == ['three']


def test_each_of_several_urls_is_tried() -> None:
    app: Any = Celery(
        'failover', broker='redis://localhost:1/8;redis://localhost:2/8', set_as_current=False,
        task_cls='celery_triggers:TriggerTask',
    )
    connection = publisher._Connection(app)
    with pytest.raises(publisher.BrokerDown):
        connection._open()
    assert connection._connection.transport_options['max_retries'] == 1


@pytest.mark.parametrize('error', [
    OSError('reset'), TimeoutError(), ResponseError('OOM command not allowed'),
    ResponseError('MISCONF Redis is configured to save'), ReadOnlyError('READONLY'),
    OperationalError('down'), ConnectionForced('shutdown'), RuntimeError('what'),
], ids=repr)
def test_what_may_be_about_the_broker_is_not_the_messages_fault(
    app: Any, monkeypatch: Any, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    break_wire(monkeypatch, broken)
    app.triggers.fire('x', 'a')
    assert services_of(app)._dispatcher.publisher.paused
    assert sends(app) == {'t_one#0': 0, 't_two#0': 0}


def test_while_the_broker_is_down_nobody_is_told_of_messages(app: Any) -> None:
    services_of(app)._dispatcher.publisher.pause(OSError('down'))
    told: list[str] = []
    handler = lambda sender=None, **_: told.append(sender)  # noqa: E731
    signals.before_task_publish.connect(handler)
    try:
        app.triggers.fire('x', 'b')
    finally:
        signals.before_task_publish.disconnect(handler)
    assert told == []


def test_an_application_that_is_not_used_any_more_goes(monkeypatch: Any) -> None:
    monkeypatch.setattr(publisher, 'IDLE', 0.05)
    app: Any = Celery('gone', broker='memory://', set_as_current=False)
    sender = publisher.Publisher(app)
    reference = weakref.ref(sender)
    sender.publish(publisher.Job([[]], lambda _: None, lambda *_: None))
    del sender

    def is_gone() -> bool:
        gc.collect()
        return reference() is None

    eventually(is_gone, 'the publisher is collected', 10)


def test_many_firings_share_one_wait_for_the_broker(app: Any, monkeypatch: Any) -> None:
    jobs: list[int] = []
    real = publisher.Publisher.publish

    def publish(self: Any, job: publisher.Job) -> list[int]:
        jobs.append(len(job.messages))
        return real(self, job)

    monkeypatch.setattr(publisher.Publisher, 'publish', publish)
    app.triggers.fire_many([(f's{n}', 'a') for n in range(30)])
    assert jobs == [60]
    assert sent(app) == ['one'] * 30 + ['two'] * 30
    for n in range(30):
        assert sends(app, f's{n}') == {'t_one#0': 1, 't_two#0': 1}
