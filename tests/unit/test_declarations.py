"""What decorators and settings refuse, and that a wrong one is not forgotten."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from celery import Celery

from celery_triggers import TriggerTask, on
from celery_triggers.exceptions import (
    InvalidConfiguration,
    InvalidFiring,
    InvalidSetting,
    StorageNotConfigured,
    StorageUnavailable,
    UnheardTrigger,
    UnknownKey,
)
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.storages.redis import RedisStorageBackend
from celery_triggers.wiring import services_of
from tests.unit.test_application import make_app


@pytest.fixture
def app() -> Iterator[Any]:
    app = make_app()
    yield app
    app.close()


# ------------------------------------------------------------------ declarations


def test_a_wrong_declaration_stays_an_error_and_no_session_begins_without_it(app: Any) -> None:
    @app.trigger_task(after=['paid'])
    def good(context: Any) -> None: ...

    @app.trigger_task(after=[object])
    def bad(context: Any) -> None: ...

    for _ in range(3):
        with pytest.raises(InvalidConfiguration, match='t_bad'):
            app.triggers.fire('x', 'paid')
    assert list(app.triggers.sessions()) == []


def test_two_functions_of_one_name_are_told_to_differ_in_it(app: Any) -> None:
    def declare(after: str) -> Any:
        @app.trigger_task(after=[after])
        def same(context: Any) -> None: ...

    declare('a')
    declare('b')
    with pytest.warns(UserWarning, match='already registered'), pytest.raises(
        InvalidConfiguration, match='another name= too'
    ):
        app.triggers.fire('x', 'a')


def test_a_task_stands_for_its_trigger_with_a_filter_too(app: Any) -> None:
    @app.trigger_task(after=['begun'])
    def measure(context: Any) -> None: ...

    @app.trigger_task(
        after=on(measure, where='value > 90', as_='peak') & on(measure, times=2, as_='both'),
        unless=[on(measure, where='broken')],
    )
    def report(context: Any) -> None: ...

    config = app.triggers.tasks['t_report']
    assert config.to_json()['after'] == [
        {'trigger': 't_measure', 'where': 'value > 90', 'as': 'peak'},
        {'trigger': 't_measure', 'as': 'both', 'times': 2},
    ]
    assert config.unless.names == ('t_measure',)


def test_several_leaves_under_unless_are_as_ambiguous_as_names(app: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='any_of'):
        app.trigger_task(
            after=['a'], unless=[on('b', where='n > 1'), on('c', times=2)]
        )(lambda context: None)


@pytest.mark.parametrize('sessions', [None, ['order:', 'parcel:'], 3, b'order:'])
def test_a_prefix_of_uids_is_a_string(app: Any, sessions: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='sessions= is one prefix'):
        app.trigger_task(after=['a'], sessions=sessions)
    with pytest.raises(InvalidConfiguration, match='sessions= is one prefix'):
        app.triggers.configure({'t_x': {'after': ['a'], 'run': 'x'}}, sessions=sessions)
    assert app.triggers.fire('order:1', 'a').heard_by == []


def test_a_workflow_has_its_sessions_already(app: Any) -> None:
    with pytest.raises(TypeError, match="'order:' says for which sessions"):
        app.triggers.workflow('order:').trigger_task(after=['a'], sessions='x:')


def no_context() -> None: ...
def too_much(paid: Any, packed: Any) -> None: ...
def keyword(*, context: Any) -> None: ...
def bound(self: Any, context: Any) -> None: ...


@pytest.mark.parametrize(
    ('function', 'options', 'called'),
    [
        (no_context, {}, 'context'),
        (too_much, {}, 'context'),
        (keyword, {}, 'context'),
        (bound, {}, 'context'),
        (no_context, {'bind': True}, 'self, context'),
    ],
)
def test_code_that_no_worker_could_call_is_refused_at_once(
    app: Any, function: Any, options: Any, called: str
) -> None:
    with pytest.raises(TypeError, match=rf'is called with \({called}\).*{function.__name__}'):
        app.trigger_task(after=['a'], **options)(function)


def anything(*args: Any, **kwargs: Any) -> None: ...
def chained(context: Any, previous: Any = None) -> None: ...


@pytest.mark.parametrize('accepted', [anything, chained, print])
def test_code_that_can_be_called_is_not(app: Any, accepted: Any) -> None:
    assert app.trigger_task(after=['a'], name=uuid.uuid4().hex)(accepted)


def test_a_class_defines_run_with_an_underscore(app: Any) -> None:
    class Nothing(TriggerTask):
        pass

    class Public(TriggerTask):
        def run(self, context: Any) -> None: ...

    class Narrow(TriggerTask):
        def _run(self) -> None: ...  # type: ignore[override]

    class Plain(TriggerTask):
        def run(self) -> int:
            return 7

    for class_ in (Nothing, Public, Narrow):
        with pytest.raises(TypeError, match=r'context'):
            app.trigger_task(after=['a'])(class_)
    app.trigger_task(after=['a'])(Plain)
    app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_plain#0'].result == 7


def test_an_attribute_of_ones_own_is_not_taken_for_a_directive(app: Any) -> None:
    @app.trigger_task(after=['a'], using_db='replica')
    def reads(context: Any) -> None: ...

    assert reads.using_db == 'replica'


# ------------------------------------------------------------- names of triggers


class Trigger(str, Enum):
    PAID = 'paid'


def test_the_member_of_an_enum_fires_its_value(app: Any) -> None:
    @app.trigger_task(after=[Trigger.PAID])
    def ship(context: Any) -> Any:
        return context[Trigger.PAID]['n']

    firing = app.triggers.fire(Trigger.PAID, Trigger.PAID, {'n': 3}, event_id=Trigger.PAID)
    assert (firing.uid, firing.trigger, firing.event_id) == ('paid', 'paid', 'paid')
    assert type(firing.trigger) is str
    assert app.triggers.session('paid').storage['t_ship#0'].result == 3


def test_an_unheard_trigger_suggests_what_was_meant() -> None:
    app = make_app(triggers_unheard='raise')

    @app.trigger_task(after=['paymentReceived', 'packed'])
    def ship(context: Any) -> None: ...

    with pytest.raises(UnheardTrigger, match="did you mean 'paymentReceived'"):
        app.triggers.fire('x', 'paymentRecieved')
    with pytest.raises(UnheardTrigger, match='they listen to: packed, paymentReceived$'):
        app.triggers.fire('x', 'zzz')


def test_a_session_that_began_empty_says_why_nobody_listens(app: Any, caplog: Any) -> None:
    trigger = f'a {uuid.uuid4()}'
    app.triggers.session('x').start()

    @app.trigger_task(after=[trigger])
    def ship(context: Any) -> None: ...

    assert app.triggers.fire('x', trigger).heard_by == []
    assert 'began in a process that knew no trigger task' in caplog.text


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('unheard', 'rise'), ('history_limit', -1), ('history_limit', 'a'), ('lease', 0),
        ('serializer', 'jsn'), ('serializer', 'pickle'), ('manager', TriggerManager),
        ('runner', print), ('key_prefix', 7), ('storage_options', 'x'),
    ],
)
def test_a_setting_that_cannot_be_so_is_named(setting: str, value: Any) -> None:
    app = make_app(**{f'triggers_{setting}': value})
    app.triggers.configure({'t_x': {'after': ['a', 'b'], 'run': 'x'}})
    with pytest.raises(InvalidSetting, match=f'triggers_{setting} must be') as caught:
        app.triggers.fire('x', 'a')
    assert (caught.value.setting, caught.value.value) == (f'triggers_{setting}', value)


@pytest.mark.parametrize('name', ['storage', 'manager'])
def test_an_unknown_key_in_a_setting_names_the_setting(name: str) -> None:
    app = make_app(**{f'triggers_{name}': 'redi'})
    with pytest.raises(UnknownKey, match=f'in the setting triggers_{name}'):
        app.triggers.fire('x', 'a')


def test_options_that_redis_does_not_have_are_a_setting_gone_wrong() -> None:
    app = make_app(triggers_storage='redis://localhost/0',
                   triggers_storage_options={'socket_timeot': 2})
    with pytest.raises(StorageNotConfigured, match='socket_timeot'):
        app.triggers.fire('x', 'a')


def test_a_database_that_redis_does_not_have_is_named() -> None:
    from tests.parts.servers import redis_url

    app = make_app(triggers_storage=redis_url(99999))
    with pytest.raises(StorageUnavailable, match='refused'):
        app.triggers.fire('x', 'a')


def test_the_broker_of_the_environment_counts(monkeypatch: Any) -> None:
    monkeypatch.setenv('CELERY_BROKER_URL', 'redis://elsewhere/7')
    app: Any = Celery('env', set_as_current=False)
    assert services_of(app).settings.storage_location() == ('redis', 'redis://elsewhere/7')
    app.conf.triggers_storage = 'memory'
    with pytest.raises(StorageNotConfigured, match='this process alone'):
        app.triggers.fire('x', 'a')


# ----------------------------------------------------------------------- storages


def real(app: Any) -> Any:
    app.conf.update(broker_url='redis://localhost', task_always_eager=False,
                    triggers_storage='sqlite:///nowhere.db')
    app.triggers.configure({'t_x': {'after': ['a'], 'run': 'x'}})
    return app


@pytest.mark.parametrize('open_', [
    lambda app: app.triggers.session('x', storage='memory'),
    lambda app: TriggerManager(MemoryStorageBackend('x', application=services_of(app))),
    lambda app: TriggerManager(
        RedisStorageBackend('x', 'redis://:secret@localhost/3', application=services_of(app))
    ),
])
def test_a_change_where_no_worker_would_look_is_refused(app: Any, open_: Any) -> None:
    with pytest.raises(StorageNotConfigured, match=r'workers look .* sqlite:///nowhere.db') as c:
        open_(real(app)).fire('a')
    assert 'secret' not in str(c.value)


@pytest.mark.parametrize('key', ['redis'])
def test_a_storage_without_a_url_is_the_configured_one_or_none(app: Any, key: str) -> None:
    with pytest.raises(StorageNotConfigured, match="triggers_storage names 'sqlite:///nowhere.db'"):
        real(app).triggers.session('x', storage=key)


def test_applications_with_other_prefixes_share_no_memory() -> None:
    one, two = (make_app(triggers_storage='memory', triggers_key_prefix=p) for p in 'ab')
    one.triggers.configure({'t_x': {'after': ['a', 'b'], 'run': 'x'}})
    one.triggers.fire('x', 'a')
    assert list(one.triggers.sessions()) == ['x']
    assert list(two.triggers.sessions()) == []
    MemoryStorageBackend.clear()
    assert list(one.triggers.sessions()) == []


# ------------------------------------------------------------------------- eager


def test_tasks_of_one_firing_share_nothing(app: Any) -> None:
    @app.trigger_task(after=['a'], trigger_name='t_1')
    def spoils(context: Any) -> None:
        context['a']['list'].append(2)

    @app.trigger_task(after=['a'], trigger_name='t_2')
    def reads(context: Any) -> Any:
        return context['a']['list']

    firing = app.triggers.fire('x', 'a', {'list': [1]})
    assert app.triggers.session('x').storage['t_2#0'].result == [1]
    assert firing.kwargs == {'list': [1]}


def test_a_task_that_exits_fails_its_instance(app: Any) -> None:
    @app.trigger_task(after=['a'])
    def leaves(context: Any) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_leaves#0'].status == 'failed'


def test_a_replay_with_what_cannot_be_stored_fails_the_instance(app: Any) -> None:
    @app.trigger_task(after=['a'], bind=True)
    def again(self: Any, context: Any) -> None:
        raise self.replay({'a': context['a']['with_'] and {'x': object()}})

    for uid, with_ in (('x', True), ('y', 0)):
        app.triggers.fire(uid, 'a', {'with_': with_})
        failed = app.triggers.session(uid).storage['t_again#0']
        assert failed.status == 'failed'
        assert failed.metadata['exception']['type'] == 'InvalidFiring'


def test_a_replay_may_replace_the_kwargs_of_an_outcome(app: Any) -> None:
    """Nobody may fire one, but a task after a failure may be run again with other facts."""

    @app.trigger_task(after=['a'])
    def breaks(context: Any) -> None:
        raise ValueError('broken')

    @app.trigger_task(after=['t_breaks:failed'], bind=True)
    def mends(self: Any, context: Any) -> Any:
        if 'type' in context['t_breaks:failed']:
            raise self.replay({'t_breaks:failed': {'by': 'hand'}})
        return context['t_breaks:failed']

    app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_mends#1'].result == {'by': 'hand'}


def test_what_a_context_fires_is_checked_as_by_fire(app: Any) -> None:
    caught: list[Exception] = []

    @app.trigger_task(after=['a'])
    def fires(context: Any) -> None:
        try:
            context.fire('b', {'x': object()})
        except InvalidFiring as exc:
            caught.append(exc)

    app.triggers.fire('x', 'a')
    assert "the kwargs of 'b' cannot be serialized" in str(caught[0])


@pytest.mark.parametrize('name', ['skip', 'retry'])
def test_what_a_task_says_of_itself_is_no_error_in_its_log(app: Any, name: str) -> None:
    @app.trigger_task(after=['a'], bind=True, max_retries=1)
    def speaks(self: Any, context: Any) -> None:
        with context.get_logger_context():
            if name == 'skip':
                raise self.skip()
            if not self.request.retries:
                raise self.retry(countdown=0)

    app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_speaks#0'].log_level_name == 'NOTSET'


def test_an_application_is_finalized_by_a_task_that_looks_at_triggers_when_bound() -> None:
    app = make_app()

    class Curious(TriggerTask):
        @classmethod
        def on_bound(cls, app: Any) -> None:
            assert app.triggers

        def _run(self, context: Any, *args: Any) -> int:
            return 3

    app.trigger_task(after=['a'])(Curious)
    app.triggers.fire('x', 'a')
    assert app.triggers.session('x').storage['t_curious#0'].result == 3


def test_a_request_class_of_ones_own_gets_what_a_claim_needs() -> None:
    from celery.worker.request import Request

    from celery_triggers.worker.request import TriggerRequest

    class Traced(Request):
        pass

    app: Any = Celery('requests', set_as_current=False, task_cls='celery_triggers:TriggerTask')

    @app.task(Request=Traced)
    def traced() -> None: ...

    @app.task
    def plain() -> None: ...

    assert issubclass(traced.Request, Traced)
    assert issubclass(traced.Request, TriggerRequest)
    assert plain.Request == TriggerTask.Request
