"""The test kit, used as an application's tests would use it."""

from __future__ import annotations

import unittest
import uuid
from typing import Any

import pytest
from celery import Celery

from celery_triggers import exceptions
from celery_triggers.testing import TriggerManagerTestCaseMixin, TriggersKit, context

app: Any = Celery('kit', broker='memory://', task_cls='celery_triggers:TriggerTask',
                  set_as_current=False)


@app.trigger_task(after=['paid', 'packed'], unless=['cancelled'], sessions='order:')
def ship(context: Any) -> dict[str, Any]:
    return {'parcel': context['packed']['box']}


@app.trigger_task(after=[ship], sessions='order:', bind=True)
def post(self: Any, context: Any) -> None:
    with context.get_logger_context() as log:
        log.warning('posting %s', context['t_ship']['parcel'])
    if context['t_ship']['parcel'] == 13:
        raise ValueError('bad luck')
    if context['t_ship']['parcel'] == 14:
        raise self.skip({'why': 'too light'})


@pytest.fixture(autouse=True)
def current() -> Any:
    from celery import _state

    before = _state.get_current_app()
    app.set_current()
    yield
    before.set_current()


def test_a_task_is_called_as_a_function() -> None:
    assert ship(context({'paid': {}, 'packed': {'box': 3}})) == {'parcel': 3}
    with pytest.raises(KeyError, match='it has: paid'):
        ship(context({'paid': {}}))


def test_a_context_fires_into_a_session_of_its_own() -> None:
    it = context({'a': {}}, uid='order:9')
    it.fire('b', {'n': 1})
    it.fire('b', {'n': 2})
    assert it.uid == 'order:9'
    assert it.firings('b') == [{'n': 1}, {'n': 2}]
    assert context(uid='order:9').firings('b') == []


def test_a_context_makes_up_its_instance() -> None:
    it = context({'paid': {'amount': 3}}, instance_name='t_ship#2')
    assert (it.task_instance.name, str(it.task_instance.status)) == ('t_ship#2', 'running')
    assert it.task_instance.kwargs == {'paid': {'amount': 3}}
    assert (it.task_instance.attempt, it.task_instance.depth) == (0, 0)
    assert it.firings('paid') == [{'amount': 3}]
    assert it.firings('packed') == []


def test_what_a_context_fires_is_sent_nowhere() -> None:
    """Not even with a broker and a storage of the application that are real."""
    app.conf.update(broker_url='redis://127.0.0.1:1', triggers_storage='redis://127.0.0.1:1')
    try:
        it = context(uid='order:1')
        assert it.fire('paid').created == ['t_ship#0']
        assert it.fire('packed', {'box': 3}).released == ['t_ship#0']
        assert it.manager.storage['t_ship#0'].status == 'scheduled'
    finally:
        app.conf.update(broker_url='memory://', triggers_storage=None)


def test_filter_kwargs_names_the_value_that_is_not_valid() -> None:
    it = context({'a': {'n': '7', 'm': 'x'}})
    assert it.filter_kwargs({'a': {'n': int}}) == {'a': {'n': 7}}
    with pytest.raises(exceptions.TriggersError, match="a.m = 'x' is not valid") as caught:
        it.filter_kwargs({'a': {'m': int}})
    assert exceptions.get_context(caught.value) == {'trigger': 'a', 'name': 'm', 'value': 'x'}


def test_the_fixture_runs_a_workflow(triggers: TriggersKit) -> None:
    triggers.fire('order:1', 'paid')
    triggers.fire('order:1', 'packed', {'box': 5})
    storage = triggers.session('order:1').storage
    assert {i.name: i.status.value for i in storage} == {
        't_post#0': 'finished', 't_ship#0': 'finished',
    }
    assert [i.name for i in storage.get_instances_with_unresolved_logs()] == ['t_post#0']
    triggers.session('order:1').mark_instance_logs_resolved('t_post#0')
    assert storage.get_instances_with_unresolved_logs() == []
    assert storage['t_post#0'].log_level_name == 'WARNING'


def test_the_fixture_forgets_its_sessions(triggers: TriggersKit) -> None:
    assert not triggers.session('order:1').storage.exists


class OrderTest(TriggerManagerTestCaseMixin, unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _kit(self, triggers: TriggersKit) -> None:
        self.kit = triggers

    def fire(self, *names: str, box: int = 5) -> None:
        self.uid = f'order:{uuid.uuid4()}'
        self.manager = self.kit.session(self.uid)
        for name in names:
            self.kit.fire(self.uid, name, {'box': box})

    def test_finished(self) -> None:
        self.fire('paid', 'packed')
        self.assertInstanceFinished('t_ship#0', {'parcel': 5})
        self.assertInstanceMissing('t_ship#1')
        self.assertUnresolvedTasks([])
        self.assertUnresolvedInstances([])
        with self.assertRaisesRegex(AssertionError, 'returned'):
            self.assertInstanceFinished('t_ship#0', {'parcel': 6})
        with self.assertRaisesRegex(AssertionError, 'is finished, not failed'):
            self.assertInstanceFailed('t_ship#0')
        with self.assertRaisesRegex(AssertionError, 'should not exist'):
            self.assertInstanceMissing('t_ship#0')
        with self.assertRaisesRegex(AssertionError, 'expected'):
            self.assertUnresolvedTasks(['t_ship'])

    def test_failed_skipped_and_replayed(self) -> None:
        self.fire('paid', 'packed', box=13)
        self.assertInstanceFailed('t_post#0', ValueError)
        with self.assertRaisesRegex(AssertionError, 'not with KeyError'):
            self.assertInstanceFailed('t_post#0', KeyError)
        self.manager.replay_failed_instance('t_post#0', {'t_ship': {'parcel': 14}})
        self.kit.join()
        self.assertInstanceReplayed('t_post#0')
        self.assertInstanceSkipped('t_post#1')
        assert self.manager.storage['t_post#1'].metadata['why'] == 'too light'

    def test_abandoned_and_unstarted(self) -> None:
        self.fire('paid')
        self.assertInstanceUnstarted('t_ship#0')
        self.assertUnresolvedInstances(['t_ship#0'])
        self.kit.fire(self.uid, 'cancelled')
        self.assertInstanceAbandoned('t_ship#0')
        with self.assertRaisesRegex(AssertionError, 'has no instance'):
            self.assertInstanceAbandoned('t_nothing#0')


PAGE = """
import pytest
import redis
from celery import Celery

URL = {url!r}
app = Celery('real', broker=URL, task_cls='celery_triggers:TriggerTask')
app.conf.task_default_queue = {queue!r}

@app.task
def plain(): ...

@app.trigger_task(after=['a'])
def one(context):
    plain.delay()

def waiting():
    with redis.Redis.from_url(URL) as client:
        return client.llen({queue!r})

def test_before():
    plain.delay()
    assert waiting() == 1

def test_with(triggers):
    triggers.fire('x', 'a')
    app.conf.triggers_history_limit = 7
    assert str(triggers.session('x').storage['t_one#0'].status) == 'finished'
    assert waiting() == 1

def test_after():
    assert app.conf.get('triggers_history_limit') is None
    plain.delay()
    assert waiting() == 2
"""


@pytest.mark.parametrize('first', ['before', 'with'])
def test_the_fixture_keeps_messages_from_a_real_broker_and_restores_it(
    tmp_path: Any, first: str
) -> None:
    """Whether or not connections were open before."""
    import subprocess
    import sys

    import redis

    from tests.parts.servers import BROKER_DB, redis_url

    url, queue = redis_url(BROKER_DB), f'triggers-{uuid.uuid4().hex}'
    page = PAGE.format(url=url, queue=queue)
    if first == 'with':
        page = page.replace('def test_before', 'def no_test_before')
        page = page.replace('waiting() == 1', 'waiting() == 0').replace('== 2', '== 1')
    (tmp_path / 'test_page.py').write_text(page)
    try:
        done = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'test_page.py'],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )
        assert done.returncode == 0, done.stdout
    finally:
        with redis.Redis.from_url(url) as client:
            client.delete(queue, f'_kombu.binding.{queue}')
