"""``task_always_eager``: everything runs at once, in this process."""

from __future__ import annotations

import uuid

import celery
import pytest

from celery_triggers import TriggerTask, current_context


@pytest.fixture
def app():
    app = celery.Celery(
        'eager', broker='memory://', task_cls='celery_triggers:TriggerTask', set_as_current=False
    )
    app.conf.update(
        task_always_eager=True, triggers_storage='memory', triggers_unheard='ignore',
        triggers_key_prefix=uuid.uuid4().hex,
    )
    yield app
    app.close()


@pytest.fixture
def uid():
    return f'eager:{uuid.uuid4().hex}'


def statuses(app, uid):
    return {i.name: str(i.status) for i in app.triggers.session(uid).storage}


def test_a_cascade_has_run_when_fire_returns(app, uid):
    @app.trigger_task(after=['go'])
    def one(context):
        return {'amount': context['go']['amount'] + 1}

    @app.trigger_task(after=[one])
    def two(context):
        return context['t_one']['amount'] + 1

    app.triggers.fire(uid, 'go', {'amount': 1})
    assert statuses(app, uid) == {'t_one#0': 'finished', 't_two#0': 'finished'}
    assert app.triggers.session(uid).storage['t_two#0'].result == 3


def test_a_failure_is_the_instances_alone_unless_eager_errors_propagate(app, uid):
    @app.trigger_task(after=['go'])
    def broken(context):
        raise LookupError('broken')

    @app.trigger_task(after=['t_broken:failed'])
    def repair(context):
        return {'type': context['t_broken:failed']['type']}

    app.triggers.fire(uid, 'go')
    assert statuses(app, uid) == {'t_broken#0': 'failed', 't_repair#0': 'finished'}
    assert app.triggers.session(uid).storage['t_repair#0'].result == {'type': 'LookupError'}


def test_a_propagated_error_reaches_whoever_fired_and_its_siblings_run_first(app, uid):
    app.conf.task_eager_propagates = True

    @app.trigger_task(after=['go'])
    def a_broken(context):
        raise LookupError('broken')

    @app.trigger_task(after=['go'])
    def b_sibling(context):
        return {'ran': True}

    @app.trigger_task(after=['t_a_broken:failed'])
    def repair(context):
        pass

    with pytest.raises(LookupError, match='broken'):
        app.triggers.fire(uid, 'go')
    assert statuses(app, uid) == {
        't_a_broken#0': 'failed', 't_b_sibling#0': 'finished', 't_repair#0': 'finished',
    }


@pytest.mark.parametrize('propagates', [False, True])
def test_a_deep_cascade_does_not_recurse(app, uid, propagates):
    app.conf.task_eager_propagates = propagates
    depth = 300

    @app.task(name='step', shared=False)
    def step():
        pass

    app.triggers.configure(
        {
            f't_{n}': {'after': [f't_{n - 1}' if n else 'go'], 'run': 'step'}
            for n in range(depth)
        }
    )
    app.triggers.fire(uid, 'go')
    assert set(statuses(app, uid).values()) == {'finished'}
    assert len(statuses(app, uid)) == depth


@pytest.mark.parametrize('propagates', [False, True])
def test_an_eager_retry_keeps_the_instance(app, uid, propagates):
    app.conf.task_eager_propagates = propagates
    attempts = []

    @app.trigger_task(after=['go'], bind=True)
    def insistent(self, context):
        attempts.append((self.request.retries, context.task_instance.attempt))
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return {'attempts': len(attempts)}

    app.triggers.fire(uid, 'go')
    assert statuses(app, uid) == {'t_insistent#0': 'finished'}
    assert attempts == [(0, 0), (1, 1), (2, 2)]
    history = app.triggers.session(uid).storage.history
    assert [record.trigger for record in history] == ['go', 't_insistent']


@pytest.mark.parametrize('propagates', [False, True])
def test_an_eager_retry_beyond_max_retries_fails_the_instance(app, uid, propagates):
    app.conf.task_eager_propagates = propagates

    @app.trigger_task(after=['go'], bind=True, max_retries=1)
    def insistent(self, context):
        raise self.retry(countdown=0, exc=ValueError('still nothing'))

    if propagates:
        with pytest.raises(ValueError, match='still nothing'):
            app.triggers.fire(uid, 'go')
    else:
        app.triggers.fire(uid, 'go')
    (instance,) = app.triggers.session(uid).storage
    assert (instance.status, instance.attempt) == ('failed', 1)
    assert instance.metadata['exception']['message'] == 'still nothing'


def test_eager_skips_replays_and_replacements_end_as_in_a_worker(app, uid):
    @app.task(name='replacement', shared=False)
    def replacement():
        return {'by': 'replacement'}

    @app.trigger_task(after=['go'], bind=True)
    def skipped(self, context):
        raise self.skip({'because': 'closed'})

    @app.trigger_task(after=['go'], bind=True)
    def replayed(self, context):
        if context.task_instance.depth == 0:
            raise self.replay({'go': {'amount': 2}})
        return dict(context['go'])

    @app.trigger_task(after=['go'], bind=True)
    def replaced(self, context):
        return self.replace(replacement.s())

    app.triggers.fire(uid, 'go', {'amount': 1})
    assert statuses(app, uid) == {
        't_skipped#0': 'skipped',
        't_replayed#0': 'replayed',
        't_replayed#1': 'finished',
        't_replaced#0': 'finished',
    }
    storage = app.triggers.session(uid).storage
    assert storage['t_skipped#0'].metadata['because'] == 'closed'
    assert storage['t_replayed#1'].result == {'amount': 2}
    assert storage['t_replaced#0'].result == {'by': 'replacement'}


def test_a_task_that_is_not_registered_here_fails_alone(app, uid):
    @app.trigger_task(after=['go'])
    def known(context):
        return {}

    app.triggers.configure({'t_ghost': {'after': ['go'], 'run': 'ghost'}})
    app.triggers.fire(uid, 'go')
    assert statuses(app, uid) == {'t_known#0': 'finished', 't_ghost#0': 'failed'}


def test_a_plain_task_finds_its_context_eagerly(app, uid):
    found = []

    @app.task(name='plain', shared=False)
    def plain():
        found.append(current_context()['go'])

    app.triggers.configure({'t_plain': {'after': ['go'], 'run': 'plain'}})
    app.triggers.fire(uid, 'go', {'amount': 1})
    assert found == [{'amount': 1}]


def test_tasks_that_nobody_released_by_a_trigger_run_as_ever(app):
    @app.task(name='add', shared=False)
    def add(x, y):
        return x + y

    assert isinstance(add, TriggerTask)
    assert add(1, 2) == add.delay(1, 2).get() == add.apply((1, 2)).get() == 3


def test_settings_made_after_the_decorators_reach_the_tasks(app):
    """Neither a decorator nor configure() looks at a task before the application is used."""

    @app.trigger_task(after=['go'])
    def one(context):
        pass

    @app.trigger_task(after=[one])
    class Two(TriggerTask):
        def _run(self, context):
            pass

    app.triggers.configure({'t_three': {'after': ['go'], 'run': 'three'}})
    app.conf.task_acks_late = True
    app.conf.task_serializer = 'yaml'
    tasks = app.triggers.tasks
    assert set(tasks) == {'t_one', 't_two', 't_three'}
    for name in ('t_one', 't_two'):
        assert app.tasks[tasks[name].run].acks_late is True
        assert app.tasks[tasks[name].run].serializer == 'yaml'


def test_the_logger_context_of_an_eager_task_uses_the_logger_of_the_task(app, uid, caplog):
    @app.trigger_task(after=['go'], name='shop.ship')
    def ship(context):
        with context.get_logger_context({'order': 7}) as logger:
            logger.warning('late', extra={'mine': 1, 'context': {'page': 2}})

    with caplog.at_level('INFO'):
        app.triggers.fire(uid, 'go')
    (record,) = [record for record in caplog.records if record.message == 'late']
    assert record.name == 'shop.ship'
    assert (record.uid, record.instance, record.mine) == (uid, 't_ship#0', 1)
    assert record.context == {'order': 7, 'page': 2}
