"""``app.triggers``: declarations, settings and what they refuse."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, Task

from celery_triggers import TriggerTask, all_of, any_of
from celery_triggers.exceptions import (
    InvalidConfiguration,
    InvalidFiring,
    MissingExtra,
    StorageNotConfigured,
    StorageUnavailable,
    TriggersError,
    UnknownKey,
)
from celery_triggers.registry import storage_backends
from celery_triggers.settings import DEFAULTS
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.wiring import services_of


def make_app(**settings: Any) -> Any:
    app: Any = Celery(
        f'app_{uuid.uuid4().hex}', broker='memory://', set_as_current=False,
        task_cls='celery_triggers:TriggerTask',
    )
    app.conf.update({'triggers_storage': f'memory://{uuid.uuid4()}', 'task_always_eager': True})
    app.conf.update(settings)
    return app


@pytest.fixture
def app() -> Iterator[Any]:
    app = make_app()
    yield app
    app.close()


def test_a_trigger_task_gets_its_name_from_the_function_or_the_class(app: Any) -> None:
    @app.trigger_task(after=['a'])
    def ship(context: Any) -> None: ...

    @app.trigger_task(after=['a'])
    class ImportSubject(TriggerTask):
        def _run(self, context: Any, *args: Any) -> int:
            return 7

    assert set(services_of(app).configuration_for('x')) == {'t_ship', 't_importSubject'}
    app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_importSubject#0'].result == 7


def test_tasks_stand_for_their_trigger_names(app: Any) -> None:
    @app.trigger_task(after=['a'])
    def one(context: Any) -> None: ...

    @app.trigger_task(after=['a'])
    class Two(TriggerTask):
        def _run(self, context: Any, *args: Any) -> None: ...

    @app.trigger_task(after=[one, Two], unless=[one], and_every=one)
    def three(context: Any) -> None: ...

    @app.trigger_task(after=any_of(one, all_of(Two, 'b')))
    def four(context: Any) -> None: ...

    assert list(services_of(app).configuration_for('x')['t_four'].after) == ['t_one', 't_two', 'b']
    three_config = services_of(app).configuration_for('x')['t_three']
    assert list(three_config.after) == ['t_one', 't_two']
    assert three_config.and_every == 't_one'
    assert list(three_config.unless) == ['t_one']


def test_a_task_with_two_trigger_names_stands_for_neither(app: Any) -> None:
    @app.trigger_task(after=['b'], trigger_name='t_second')
    @app.trigger_task(after=['a'], trigger_name='t_first')
    def one(context: Any) -> None: ...

    @app.trigger_task(after=[one])
    def two(context: Any) -> None: ...

    with pytest.raises(InvalidConfiguration, match=r't_first.*t_second'):
        services_of(app).configuration_for('x')


def test_stacked_decorators_make_several_trigger_tasks_of_one_task(app: Any) -> None:
    @app.trigger_task(after=['b'], trigger_name='t_second', sessions='two:')
    @app.trigger_task(after=['a'], trigger_name='t_first', sessions='one:')
    def task(context: Any) -> None: ...

    assert set(services_of(app).configuration_for('one:1')) == {'t_first'}
    assert set(services_of(app).configuration_for('two:1')) == {'t_second'}


def test_a_plain_unless_list_of_several_is_refused_in_code(app: Any) -> None:
    with pytest.raises(InvalidConfiguration, match=r'any_of\(...\) or all_of'):
        app.trigger_task(after=['a'], unless=['b', 'c'])

    @app.trigger_task(after=['a'], unless=any_of('b', 'c'))
    def fine(context: Any) -> None: ...

    app.triggers.fire('x', 'c')
    assert app.triggers.session('x').storage['t_fine#0'].status == 'abandoned'


def test_two_workflows_share_trigger_names_and_not_their_tasks(app: Any) -> None:
    @app.trigger_task(after=['paid'], sessions='order:', trigger_name='t_go')
    def ship(context: Any) -> str:
        return 'ship'

    @app.trigger_task(after=['paid'], sessions='ticket:', trigger_name='t_go')
    def admit(context: Any) -> str:
        return 'admit'

    @app.trigger_task(after=['paid'])
    def account(context: Any) -> str:
        return 'account'

    for uid, result in (('order:1', 'ship'), ('ticket:1', 'admit')):
        app.triggers.fire(uid, 'paid')
        storage = app.triggers.session(uid).storage
        assert [i.result for i in storage] == ['account', result]
    assert set(app.triggers.workflow('order:').tasks) == {'t_go'}
    assert set(app.triggers.tasks) == {'t_account'}


def test_one_name_from_two_tasks_in_overlapping_sessions_is_refused(app: Any) -> None:
    app.triggers.configure({'t_x': {'after': ['a'], 'run': 'x'}}, sessions='order:')
    with pytest.raises(InvalidConfiguration, match='declared twice'):
        app.triggers.configure(
            {'t_x': {'after': ['b'], 'run': 'x'}, 't_y': {'after': ['b'], 'run': 'x'}}
        )
    assert set(services_of(app).configuration_for('order:1')) == {'t_x'}, 'refused whole'
    app.triggers.workflow('ticket:').configure({'t_x': {'after': ['b'], 'run': 'x'}})


def test_a_wrong_declaration_is_named_when_it_is_first_needed(app: Any) -> None:
    @app.trigger_task(after=[7])
    def wrong(context: Any) -> None: ...

    with pytest.raises(InvalidConfiguration, match='t_wrong'):
        app.triggers.fire('x', 'a')


def test_the_decorator_says_what_it_needs(app: Any) -> None:
    with pytest.raises(TypeError, match='after='):
        app.trigger_task(lambda context: None)
    with pytest.raises(TypeError, match='functions and classes'):
        app.trigger_task(after=['a'])(7)
    with pytest.raises(TypeError, match='TriggerTask'):
        app.trigger_task(after=['a'])(dict)


def test_a_decorator_refuses_at_once_what_it_can(app: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='can never run'):
        app.trigger_task(queue='fast')
    with pytest.raises(TypeError, match='did you mean unless='):
        app.trigger_task(after=['a'], unles=['b'])
    with pytest.raises(TypeError, match='did you mean and_every='):
        app.trigger_task(andEvery='a', after=['a'])
    with pytest.raises(TypeError, match='did you mean after='):
        app.trigger_task(and_every='a', aftr=['b'])


def test_a_deadline_stands_in_the_decorator(app: Any) -> None:
    @app.trigger_task(after=['a', 'b'], within=60)
    def late(context: Any) -> None: ...

    firing = app.triggers.fire('x', 'a')
    [instance] = app.triggers.session('x').storage
    assert instance.deadline == firing.at + timedelta(seconds=60)


def test_celery_options_are_passed_on(app: Any) -> None:
    @app.trigger_task(after=['a'], max_retries=7, rate_limit='3/m', my_own='yes')
    def task(context: Any) -> None: ...

    assert (task.max_retries, task.rate_limit, task.my_own) == (7, '3/m', 'yes')


def test_calling_a_trigger_task_without_a_context_says_what_to_do(app: Any) -> None:
    @app.trigger_task(after=['a'])
    def ship(context: Any) -> None: ...

    with pytest.raises(TriggersError, match=r'celery_triggers\.testing'):
        ship()


def test_an_application_with_another_task_class_gets_trigger_tasks_all_the_same() -> None:
    class Mine(Task):
        mine = True

    app: Any = Celery('other', broker='memory://', task_cls=Mine, set_as_current=False)
    app.conf.update(triggers_storage=f'memory://{uuid.uuid4()}', task_always_eager=True)

    @app.trigger_task(after=['a'])
    def ship(context: Any) -> int:
        return 3

    app.triggers.fire('x', 'a')
    assert isinstance(ship, TriggerTask)
    assert ship.mine
    assert app.triggers.session('x').storage['t_ship#0'].result == 3


@pytest.mark.parametrize(
    ('call', 'kind'),
    [
        (lambda app: app.triggers.session('x', manager='nonsense'), 'finalizing'),
        (lambda app: app.triggers.session('x', storage='nonsense'), 'memory'),
        (lambda app: storage_backends.get('nonsense', 'x'), 'redis'),
    ],
)
def test_an_unknown_key_lists_the_known_ones(app: Any, call: Any, kind: str) -> None:
    with pytest.raises(UnknownKey, match=kind) as caught:
        call(app)
    assert kind in caught.value.known


@pytest.mark.parametrize(
    'settings', [{'triggers_manager': 'nonsense'}, {'triggers_runner': 'nonsense'},
                 {'triggers_storage': 'nonsense'}, {'triggers_storage': 'nonsense://x'}],
    ids=repr,
)
def test_an_unknown_key_in_a_setting_is_refused_by_fire(settings: dict[str, Any]) -> None:
    app = make_app(**settings)
    with pytest.raises(UnknownKey, match='nonsense'):
        app.triggers.fire('x', 'a')


def test_an_unknown_runner_in_a_configuration_is_refused(app: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='threading'):
        app.triggers.configure({'t_x': {'after': ['a'], 'run': 'x', 'using': 'nonsense'}})


def test_memory_behind_a_real_broker_is_refused() -> None:
    app = make_app(broker_url='redis://localhost', task_always_eager=False,
                   triggers_storage='memory')
    for settings in ({'triggers_storage': 'memory'}, {'triggers_storage': 'memory://'}):
        app.conf.update(settings)
        with pytest.raises(StorageNotConfigured, match='this process alone'):
            app.triggers.fire('x', 'a')


def test_without_a_storage_the_error_says_what_to_set() -> None:
    app: Any = Celery('none', broker='amqp://', backend='rpc://', set_as_current=False)
    with pytest.raises(StorageNotConfigured, match='triggers_storage'):
        app.triggers.fire('x', 'a')


@pytest.mark.parametrize(
    ('conf', 'expected'),
    [
        ({'result_backend': 'redis://h/1', 'broker_url': 'amqp://'}, ('redis', 'redis://h/1')),
        ({'broker_url': 'redis://h/2'}, ('redis', 'redis://h/2')),
        ({'result_backend': 'db+sqlite:///x.db'}, ('sql', 'sqlite:///x.db')),
        ({'broker_url': 'memory://'}, ('memory', None)),
        ({'triggers_storage': 'sqlite:///y.db', 'broker_url': 'redis://h'}, ('sql', 'sqlite:///y.db')),
        ({'triggers_storage': 'redis'}, ('redis', None)),
    ],
)
def test_the_storage_is_derived_from_what_celery_uses(conf: Any, expected: Any) -> None:
    from celery_triggers.settings import Settings

    assert Settings(conf.get).storage_location() == expected


def test_sql_without_its_extra_names_the_extra() -> None:
    code = (
        'import sys; sys.modules["sqlalchemy"] = None\n'
        'from celery import Celery\n'
        'app = Celery("x", broker="memory://")\n'
        'app.conf.triggers_storage = "sqlite:///x.db"\n'
        'app.triggers.fire("x", "a")\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert MissingExtra.__name__ in done.stderr
    assert "pip install 'celery_triggers[sql]'" in done.stderr


def test_a_storage_that_is_down_raises_with_the_event_id() -> None:
    app = make_app(triggers_storage='redis://127.0.0.1:1/0')
    with pytest.raises(StorageUnavailable, match='127.0.0.1:1') as caught:
        app.triggers.fire('x', 'a', event_id='e1')
    assert caught.value.event_id == 'e1'
    assert not caught.value.outcome_unknown


def test_sessions_are_listed_by_prefix_and_deleted(app: Any) -> None:
    app.triggers.configure({'t_x': {'after': ['a', 'b'], 'run': 'x'}})
    for uid in ('order:1', 'order:2', 'ticket:1'):
        app.triggers.fire(uid, 'a')
    assert sorted(app.triggers.sessions('order:')) == ['order:1', 'order:2']
    assert app.triggers.delete('order:1')
    assert not app.triggers.delete('order:1')
    assert sorted(app.triggers.sessions()) == ['order:2', 'ticket:1']


def test_fire_many_and_afire(app: Any) -> None:
    import asyncio

    app.triggers.configure({'t_x': {'after': ['a', 'b'], 'run': 'x'}})
    firings = app.triggers.fire_many(
        [('x', 'a'), ('x', 'c', {'n': 1}), {'uid': 'y', 'trigger_name': 'a', 'event_id': 'e'}]
    )
    assert [f.uid for f in firings] == ['x', 'x', 'y']
    assert asyncio.run(app.triggers.afire('y', 'a', event_id='e')).duplicate


@pytest.mark.parametrize('bad', [
    ('', 'a'), ('y', ''), ('y', 't_x:failed'), ('y', 'a', 'no mapping'), ('y',),
    ('y', 'a', {'x': object()}),
    {'uid': 'y', 'trigger_name': 'a', 'event_id': ''},
    {'uid': 'y', 'trigger_name': 'a', 'surprise': 1},
])
def test_bad_input_to_fire_many_changes_nothing(app: Any, bad: Any) -> None:
    app.triggers.configure({'t_x': {'after': ['a'], 'run': 'x'}})
    with pytest.raises((InvalidFiring, TypeError)):
        app.triggers.fire_many(iter([('x', 'a'), bad, ('x', 'a')]))
    assert list(app.triggers.sessions()) == []


def test_a_task_that_nobody_knows_fails_alone(app: Any) -> None:
    @app.trigger_task(after=['a'])
    def fine(context: Any) -> None: ...

    app.triggers.configure({'t_unknown': {'after': ['a'], 'run': 'nowhere'}})
    app.triggers.fire('x', 'a')
    storage = app.triggers.session('x').storage
    assert {i.name: i.status.value for i in storage} == {
        't_fine#0': 'finished', 't_unknown#0': 'failed',
    }
    assert 'nowhere' in storage['t_unknown#0'].metadata['exception']['message']


def test_every_setting_has_a_default(app: Any) -> None:
    for name, default in DEFAULTS.items():
        if name not in ('triggers_storage',):
            assert getattr(services_of(app).settings, name.removeprefix('triggers_')) == default
    with pytest.raises(AttributeError, match='triggers_nonsense'):
        _ = services_of(app).settings.nonsense


def test_all_lists_what_the_namespaces_hold() -> None:
    import importlib

    for name in ('celery_triggers', 'celery_triggers.storages', 'celery_triggers.testing',
                 'celery_triggers.exceptions', 'celery_triggers.manager',
                 'celery_triggers.runners', 'celery_triggers.task'):
        module = importlib.import_module(name)
        assert all(getattr(module, public) is not None for public in module.__all__), name


def test_memory_spaces_do_not_share_sessions(app: Any) -> None:
    one = MemoryStorageBackend('x', 'memory://one', application=app.triggers)
    assert not one.exists
