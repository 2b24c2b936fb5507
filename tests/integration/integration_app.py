"""The application that the integration tests and their workers share.

The environment variable ``TRIGGERS_TEST_APP`` holds its settings as JSON, so that a worker
and every process that fires build the same application. Each scenario has a prefix of its
own, which the uids of its sessions begin with.
"""

# ruff: noqa: C901 - one declaration after the other is not complex

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import canvas_app
import celery
import redis
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import before_task_publish
from pydantic import BaseModel

from celery_triggers import TriggerManager, TriggerTask, any_of, current_context
from celery_triggers.exceptions import with_context
from celery_triggers.manager import FinalizingTriggerManager, trigger_managers

ENVIRONMENT = 'TRIGGERS_TEST_APP'

#: ``redis_url`` and ``name`` of the application made last; what the journal needs.
_journal: dict[str, Any] = {}


def journal(*key: str) -> str:
    return ':'.join((_journal['name'], 'journal', *key))


def note(key: str, *words: object) -> None:
    """Append a line to a journal that the tests read."""
    _journal['client'].rpush(journal(key), ' '.join(map(str, words)))


def use_journal(app: celery.Celery) -> None:
    """Turn to the journals of one of several applications."""
    url, name = app.conf.result_backend, app.conf.triggers_key_prefix
    _journal.update(name=name, client=redis.Redis.from_url(url, decode_responses=True))


def lines(key: str) -> list[str]:
    found: list[str] = _journal['client'].lrange(journal(key), 0, -1)
    return found


@trigger_managers.register('noting')
class NotingManager(TriggerManager):
    """Notes each hook with the process that called it."""

    def _post_fire(self, trigger_name: str, tasks_scheduled: list[Any]) -> None:
        names = [instance.name for instance in tasks_scheduled]
        note(self.uid, 'fired', trigger_name, ','.join(names) or '-', os.getpid())

    def _post_replay(self, task_instance: Any) -> None:
        note(self.uid, 'replayed', task_instance.name)

    def _post_skip(self, task_instance: Any, cascade: bool) -> None:
        note(self.uid, 'skipped', task_instance.name, cascade)
        raise RuntimeError('a hook that fails undoes nothing')


class UnregisteredManager(TriggerManager):
    """Nobody registered it."""


class ApiError(Exception):
    """Cannot be pickled, like any exception that passes its base other arguments."""

    def __init__(self, status: int, text: str):
        super().__init__(f'{status}: {text}')


class BadGateway(ValueError):
    """Celery falls back to its base."""

    def __init__(self, status: int, text: str):
        super().__init__(f'{status}: {text}')


class Parcel(BaseModel):
    weight: int


class Application(celery.Celery):
    """An application whose tasks are its own: several of them live in the test process."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{'shared': False, **options})


def nest_headers(headers: Any = None, **_: Any) -> None:
    """Add a header as sentry-sdk up to 2.54 and ddtrace do: Celery then knows that one alone."""
    headers.setdefault('headers', {}).update({'x-trace': '1'})


def create(*, broker: str, redis_url: str, name: str, **settings: Any) -> celery.Celery:
    """Return the application with all its trigger tasks."""
    app = Application(
        'integration',
        broker=broker,
        backend=redis_url,
        task_cls='celery_triggers:TriggerTask',
        set_as_current=False,
    )
    app.conf.update(
        result_backend_transport_options={'global_keyprefix': f'{name}:'},
        result_expires=600,
        task_default_queue=name,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=4,
        worker_send_task_events=False,
        triggers_storage=redis_url,
        triggers_key_prefix=name,
        triggers_unheard='ignore',
    )
    if broker.startswith('redis'):
        app.conf.broker_transport_options = {'global_keyprefix': f'{name}:'}
    if settings.pop('reshaped', False) or os.environ.get('TRIGGERS_TEST_RESHAPED'):
        before_task_publish.connect(nest_headers)
    app.conf.update(settings)
    use_journal(app)
    _declare_results(app)
    _declare_failures(app)
    _declare_retries(app)
    _declare_control(app)
    _declare_outages(app)
    _declare_leases(app)
    _declare_deadlines(app)
    _declare_replacements(app)
    _declare_kinds(app)
    _declare_context(app)
    _declare_questionnaire(app)
    canvas_app.add_canvas_tasks(app)
    return app


def from_environment() -> celery.Celery:
    return create(**json.loads(os.environ[ENVIRONMENT]))


# ------------------------------------------------------------------- scenarios


def _declare_results(app: Any) -> None:
    workflow = app.triggers.workflow('results:')

    @workflow.trigger_task(after=['go'])
    def mapping(context: Any) -> Any:
        note(context.uid, 'mapping')
        return {'parcel': {'weight': 3}}

    @workflow.trigger_task(after=['go'])
    def nothing(context: Any) -> None:
        note(context.uid, 'nothing')

    @workflow.trigger_task(after=['go'])
    def number(context: Any) -> Any:
        note(context.uid, 'number')
        return 42

    for followed in (mapping, nothing, number):
        name = f'follow_{followed.__name__}'

        @workflow.trigger_task(after=[f't_{followed.__name__}'], trigger_name=name, name=name)
        def follow(context: Any) -> Any:
            return {'received': dict(context.trigger_kwargs)}


def _declare_failures(app: Any) -> None:
    workflow = app.triggers.workflow('failures:')

    @workflow.trigger_task(after=['raise'])
    def raises(context: Any) -> None:
        note(context.uid, 'raises')
        raise with_context(ValueError('no such order'), {'order': 7})

    @workflow.trigger_task(after=['t_raises:failed'])
    def apologize(context: Any) -> Any:
        note(context.uid, 'apologize')
        return dict(context['t_raises:failed'])

    @workflow.trigger_task(after=['t_raises'])
    def never(context: Any) -> None:
        note(context.uid, 'never')

    @workflow.trigger_task(after=['unstorable'])
    def unstorable(context: Any) -> Any:
        return {'object': object()}

    @workflow.trigger_task(after=['unstorable facts'])
    def strange_failure(context: Any) -> None:
        raise with_context(ValueError('strange'), {'order': 7, 'lock': threading.Lock()})

    @workflow.trigger_task(after=['unstorable facts'], bind=True)
    def strange_skip(self: Any, context: Any) -> None:
        raise self.skip({'lock': threading.Lock()})

    @workflow.trigger_task(after=['unstorable facts'], bind=True)
    def strange_replay(self: Any, context: Any) -> None:
        if context.task_instance.depth == 0:
            raise self.replay(metadata={'lock': threading.Lock()})

    @workflow.trigger_task(after=['unpicklable'])
    def unpicklable(context: Any) -> None:
        kind = {'wrapper': ApiError, 'base': BadGateway}[context['unpicklable']['kind']]
        raise with_context(kind(502, 'bad gateway'), {'order': 7})

    @workflow.trigger_task(after=['soft'], soft_time_limit=1)
    def slow(context: Any) -> None:
        time.sleep(30)

    @workflow.trigger_task(after=['soft'], soft_time_limit=1)
    def tidy(context: Any) -> Any:
        try:
            time.sleep(30)
        except SoftTimeLimitExceeded:
            return {'tidied': True}

    @workflow.trigger_task(after=['hard'], time_limit=1)
    def endless(context: Any) -> None:
        note(context.uid, 'endless')
        time.sleep(30)

    @workflow.trigger_task(after=['kill'])
    def killed(context: Any) -> None:
        note(context.uid, 'killed')
        os.kill(os.getpid(), signal.SIGKILL)

    @workflow.trigger_task(after=['kill late'], acks_late=True, reject_on_worker_lost=False)
    def killed_late(context: Any) -> None:
        note(context.uid, 'killed')
        os.kill(os.getpid(), signal.SIGKILL)

    @workflow.trigger_task(after=['kill once'], acks_late=True)
    def killed_once(context: Any) -> Any:
        note(context.uid, 'killed_once')
        if len(lines(context.uid)) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {'runs': len(lines(context.uid))}

    @workflow.trigger_task(after=['yaml'], serializer='yaml')
    def in_yaml(context: Any) -> None:
        note(context.uid, 'in_yaml')

    @workflow.trigger_task(after=['ghost'])
    def first(context: Any) -> None:
        note(context.uid, 'first')

    @workflow.trigger_task(after=[first])
    def sibling(context: Any) -> None:
        note(context.uid, 'sibling')

    workflow.configure({'t_ghost': {'after': ['t_first'], 'run': 'integration.ghost'}})


def _declare_deadlines(app: Any) -> None:
    """A task that waits for what never comes, and one that takes its place."""
    workflow = app.triggers.workflow('deadlines:')

    @workflow.trigger_task(after=['begun', 'never'], within=1)
    def patient(context: Any) -> None: ...

    @workflow.trigger_task(after=['t_patient:expired'])
    def makeshift(context: Any) -> Any:
        return context['t_patient:expired']['missing']


def _declare_leases(app: Any) -> None:
    """Tasks that outlive their leases, are lost, or come again much later."""
    workflow = app.triggers.workflow('leases:')

    @workflow.trigger_task(after=['linger'])
    def lingers(context: Any) -> None:
        note(context.uid, 'begins')
        deadline = time.monotonic() + context['linger']['seconds']
        while time.monotonic() < deadline:
            # Holds the main thread in the pool solo, but lets other greenlets run.
            time.sleep(0.05)
        note(context.uid, 'ends')

    @workflow.trigger_task(after=['t_lingers'])
    def after_lingering(context: Any) -> None: ...

    @workflow.trigger_task(and_every='retry later', bind=True)
    def retry_later(self: Any, context: Any) -> None:
        note(context.uid, 'attempt', self.request.retries, time.time())
        if not self.request.retries:
            raise self.retry(**context['retry later'])

    def die_once(context: Any) -> dict[str, int]:
        note(context.uid, 'dies' if not lines(context.uid) else 'lives')
        if lines(context.uid) == ['dies']:
            os.kill(os.getpid(), signal.SIGKILL)
        return {'depth': context.task_instance.depth}

    @workflow.trigger_task(after=['die'])
    def dies(context: Any) -> Any:
        return die_once(context)

    @workflow.trigger_task(after=['die late'], acks_late=True)
    def dies_late(context: Any) -> Any:
        return die_once(context)

    @workflow.trigger_task(after=['die unnoticed'])
    def unnoticed_dies(context: Any) -> Any:
        return die_once(context)

    @workflow.trigger_task(after=['die unnoticed late'], acks_late=True)
    def unnoticed_dies_late(context: Any) -> Any:
        return die_once(context)

    @workflow.trigger_task(after=['die and come back'], replay_lost=True)
    def dies_and_comes_back(context: Any) -> Any:
        return die_once(context)

    @workflow.trigger_task(after=['die always'], replay_lost=True, max_retries=2)
    def always_dies(context: Any) -> None:
        note(context.uid, 'dies')
        os.kill(os.getpid(), signal.SIGKILL)

    @workflow.trigger_task(after=['die always late'], acks_late=True)
    def always_dies_late(context: Any) -> None:
        note(context.uid, 'dies')
        os.kill(os.getpid(), signal.SIGKILL)

    for name in ('late', 'early'):
        @workflow.trigger_task(
            after=[f'hold {name}'], acks_late=name == 'late', trigger_name=f't_hold_{name}',
            name=f'hold_{name}',
        )
        def hold(context: Any) -> None:
            note(context.uid, 'runs')
            deadline = time.monotonic() + 60
            while 'go on' not in lines(context.uid) and time.monotonic() < deadline:
                time.sleep(0.02)
            note(context.uid, 'ends')


def _declare_retries(app: Any) -> None:
    workflow = app.triggers.workflow('retries:')

    def attempt(task: Any, context: Any) -> int:
        note(context.uid, 'attempt', context.task_instance.attempt, task.request.retries)
        return int(task.request.retries)

    @workflow.trigger_task(after=['at once'], bind=True)
    def at_once(self: Any, context: Any) -> Any:
        if attempt(self, context) < 2:
            raise self.retry(countdown=0)
        return {'paid': context['at once']['amount']}

    @workflow.trigger_task(after=['later'], bind=True)
    def later(self: Any, context: Any) -> Any:
        if attempt(self, context) < 1:
            note(context.uid, 'asked', time.time())
            raise self.retry(countdown=1)
        note(context.uid, 'ran', time.time())

    @workflow.trigger_task(after=['dated'], bind=True)
    def dated(self: Any, context: Any) -> Any:
        if attempt(self, context) < 1:
            with context.get_logger_context() as log:
                log.warning('the first attempt')
                at = datetime.now(timezone.utc) + timedelta(seconds=0.5)
                dates = {'aware': at, 'naive': at.replace(tzinfo=None), 'text': at.isoformat()}
                raise self.retry(eta=dates[context['dated']['as']])

    @workflow.trigger_task(
        after=['automatic'], bind=True, autoretry_for=(KeyError,), retry_backoff=False,
        default_retry_delay=0,
    )
    def automatic(self: Any, context: Any) -> Any:
        if attempt(self, context) < 3:
            raise KeyError('again')

    @workflow.trigger_task(after=['too often'], bind=True, max_retries=1)
    def too_often(self: Any, context: Any) -> None:
        attempt(self, context)
        raise self.retry(exc=ValueError('still nothing'), countdown=0)

    @workflow.trigger_task(
        after=['requeue late'], bind=True, acks_late=True, trigger_name='t_requeueLate'
    )
    def requeue_late(self: Any, context: Any) -> Any:
        note(context.uid, 'ran')
        if len(lines(context.uid)) < 3:
            raise Reject('busy', requeue=True)

    @workflow.trigger_task(after=['requeue early'], trigger_name='t_requeueEarly')
    def requeue_early(context: Any) -> Any:
        note(context.uid, 'ran')
        if len(lines(context.uid)) < 3:
            raise Reject('busy', requeue=True)

    @workflow.trigger_task(after=['reject'])
    def reject(context: Any) -> None:
        raise Reject('unusable', requeue=False)

    @workflow.trigger_task(after=['reject late'], acks_late=True)
    def reject_late(context: Any) -> None:
        raise Reject('unusable', requeue=False)


def _declare_outages(app: Any) -> None:
    workflow = app.triggers.workflow('outages:')

    def hold(context: Any) -> None:
        """Say that it runs, and run until it is told to go on."""
        note(context.uid, 'runs')
        while len(lines(context.uid)) < 2:
            time.sleep(0.02)

    @workflow.trigger_task(after=['hold'])
    def held(context: Any) -> Any:
        hold(context)
        if context['hold'].get('fail'):
            raise ValueError('bad luck')
        return {'n': 1}

    @workflow.trigger_task(after=['hold softly'], soft_time_limit=2)
    def held_softly(context: Any) -> Any:
        hold(context)
        return {'n': 1}

    @workflow.trigger_task(after=['hold and retry'], bind=True)
    def held_again(self: Any, context: Any) -> Any:
        if not self.request.retries:
            hold(context)
            raise self.retry(countdown=0)
        return {'n': 1}

    @workflow.trigger_task(after=[any_of(held, held_softly, held_again)])
    def follows(context: Any) -> None:
        note(context.uid, 'follows')

    @workflow.trigger_task(after=['t_held:failed'])
    def mourns(context: Any) -> None:
        note(context.uid, 'mourns')

    @workflow.trigger_task(after=['limit'], time_limit=1)
    def limited(context: Any) -> None:
        note(context.uid, 'runs')
        time.sleep(60)

    @workflow.trigger_task(and_every='quick')
    def quick(context: Any) -> Any:
        return {'pid': os.getpid()}

    @workflow.trigger_task(after=['hold and fire'])
    def fires_late(context: Any) -> None:
        hold(context)
        context.fire('late')


def _declare_control(app: Any) -> None:
    workflow = app.triggers.workflow('control:')
    parked = f'{app.conf.task_default_queue}-parked'

    @workflow.trigger_task(after=['park'], queue=parked, track_started=True)
    def park(context: Any) -> Any:
        note(context.uid, 'park')
        time.sleep(context['park'].get('seconds', 0))
        return {'ran': True}

    @workflow.trigger_task(after=['sleep'])
    def sleep(context: Any) -> None:
        note(context.uid, 'sleep')
        time.sleep(60)

    @workflow.trigger_task(after=['perish'], bind=True, expires=3)
    def perish(self: Any, context: Any) -> Any:
        note(context.uid, 'perish')
        if context.task_instance.depth == 0:
            raise self.replay(countdown=4)

    @workflow.trigger_task(after=['ignore'])
    def ignore(context: Any) -> None:
        raise Ignore('nothing to do')

    @workflow.trigger_task(after=['skip'], bind=True)
    def skip(self: Any, context: Any) -> None:
        raise self.skip({'because': 'closed'})

    @workflow.trigger_task(after=['t_skip'])
    def after_skip(context: Any) -> None:
        note(context.uid, 'after_skip')

    @workflow.trigger_task(after=['replay'], bind=True)
    def replay(self: Any, context: Any) -> Any:
        if context['replay']['amount'] < 0:
            raise self.replay(
                {'replay': {'amount': 1}}, exc=ValueError('negative'), metadata={'by': 'code'},
                countdown=context['replay'].get('countdown', 0),
            )
        return {'amount': context['replay']['amount']}

    @workflow.trigger_task(after=['replay wrongly'], bind=True)
    def replay_wrongly(self: Any, context: Any) -> Any:
        raise self.replay({'replay wrongly': {'lock': threading.Lock()}})

    @workflow.trigger_task(after=['replay for ever'], bind=True, max_retries=2)
    def replay_for_ever(self: Any, context: Any) -> None:
        note(context.uid, 'run')
        raise self.replay(exc=ValueError('not yet'))

    class Careful(TriggerTask):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            note(self.request.headers['triggers']['uid'], 'before_start')

    @workflow.trigger_task(after=['careful'], base=Careful, queue=parked)
    def careful(context: Any) -> None:
        note(context.uid, 'careful')


def _declare_replacements(app: Any) -> None:
    workflow = app.triggers.workflow('replacements:')

    @app.task(name='add')
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name='total')
    def total(numbers: list[int]) -> dict[str, int]:
        return {'total': sum(numbers)}

    @app.task(name='as_total')
    def as_total(number: int) -> dict[str, int]:
        return {'total': number}

    @app.task(name='broken')
    def broken(*_: Any) -> None:
        raise LookupError('broken')

    @app.task(name='broken_foreign', base=celery.Task)
    def broken_foreign(*_: Any) -> None:
        raise LookupError('broken')

    @app.task(name='insistent', bind=True)
    def insistent(self: Any) -> dict[str, int]:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return {'total': self.request.retries}

    @app.task(name='insistent_foreign', base=celery.Task, bind=True)
    def insistent_foreign(self: Any) -> dict[str, int]:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return {'total': self.request.retries}

    @app.task(name='successor', bind=True)
    def successor(self: Any) -> Any:
        raise self.replace(as_total.s(6))

    replacements = {
        'task': lambda: as_total.s(2),
        'chain': lambda: chain(add.s(1, 1), add.s(1), as_total.s()),
        'chord': lambda: chord([add.s(1, 1), add.s(2, 2)], total.s()),
        'group': lambda: group(add.s(1, 1), add.s(2, 2)),
        'retrying task': lambda: insistent.si(),
        'replaced task': lambda: successor.si(),
        'broken task': lambda: broken.si(),
        'broken foreign task': lambda: broken_foreign.si(),
        'broken chain': lambda: chain(broken.s(), as_total.s()),
        'chain broken at its end': lambda: chain(add.s(1, 1), broken.s()),
        'broken chord': lambda: chord([add.s(1, 1), broken.s()], total.s()),
        'chord with broken body': lambda: chord([add.s(1, 1), add.s(1, 1)], broken.s()),
    }

    @workflow.trigger_task(after=['replace'], bind=True)
    def replace(self: Any, context: Any) -> Any:
        note(context.uid, 'replace')
        raise self.replace(replacements[context['replace']['by']]())

    @workflow.trigger_task(after=[replace])
    def after_replace(context: Any) -> Any:
        note(context.uid, 'after_replace')
        return dict(context['t_replace'])


def _declare_kinds(app: Any) -> None:
    workflow = app.triggers.workflow('kinds:')

    @app.task(name='plain')
    def plain() -> Any:
        context = current_context()
        note(context.uid, 'plain', context['go']['amount'])
        return {'by': context.instance_name}

    @app.task(name='foreign', base=celery.Task)
    def foreign() -> Any:
        context = current_context()
        note(context.uid, 'foreign', context['go']['amount'])
        return {'by': context.instance_name}

    @app.task(name='foreign_broken', base=celery.Task)
    def foreign_broken() -> None:
        raise LookupError('broken')

    workflow.configure(
        {
            't_plain': {'after': ['go'], 'run': 'plain'},
            't_foreign': {'after': ['go'], 'run': 'foreign'},
            't_foreignBroken': {'after': ['go'], 'run': 'foreign_broken'},
            't_insistent': {'after': ['insist'], 'run': 'insistent'},
            't_insistentForeign': {'after': ['insist'], 'run': 'insistent_foreign'},
            't_elsewhere': {'after': ['elsewhere'], 'run': 'only_in_the_worker'},
            't_elsewherePlain': {'after': ['elsewhere'], 'run': 'only_in_the_worker_plain'},
            't_elsewhereForeign': {'after': ['elsewhere'], 'run': 'only_in_the_worker_foreign'},
        }
    )

    @workflow.trigger_task(after=['t_plain', 't_foreign'])
    def after_both(context: Any) -> Any:
        return {'plain': context['t_plain']['by'], 'foreign': context['t_foreign']['by']}

    @workflow.trigger_task(after=['decorated'], bind=True)
    def bound(self: Any, context: Any) -> Any:
        return {'name': self.name, 'id': self.request.id == context.task_instance.task_id}

    @workflow.trigger_task(after=['decorated'])
    def unbound(context: Any) -> Any:
        return {'uid': context.uid, 'amount': context['decorated']['amount']}

    @workflow.trigger_task(after=['decorated'])
    class InClass(TriggerTask):
        name = 'in_class'

        def _run(self, context: Any) -> Any:
            return {'name': self.name, 'amount': context['decorated']['amount']}

    @workflow.trigger_task(after=['stacked a'], trigger_name='t_stackedA')
    @workflow.trigger_task(after=['stacked b'], trigger_name='t_stackedB')
    def stacked(context: Any) -> Any:
        return {'by': context.instance_name}

    @workflow.trigger_task(
        after=[bound], unless=any_of('refuse', 'refuse too'),
        queue=f'{app.conf.task_default_queue}-other', name='with_options', max_retries=7,
        acks_late=True, autoretry_for=(KeyError,), rate_limit='100/s', serializer='json',
        bind=True,
    )
    def with_options(self: Any, context: Any) -> Any:
        return {'queue': self.request.delivery_info['routing_key']}

    @workflow.trigger_task(after=[InClass, unbound])
    def after_tasks(context: Any) -> Any:
        return {'amounts': [context['t_inClass']['amount'], context['t_unbound']['amount']]}

    @workflow.trigger_task(after=['pydantic'], pydantic=True)
    def weighed(context: Any) -> Parcel:
        return Parcel(weight=context['pydantic']['weight'])


def declare_only_in_the_worker(app: Any) -> None:
    """Add tasks that the processes that fire do not know."""

    @app.task(name='only_in_the_worker_plain')
    def only_plain() -> Any:
        note(current_context().uid, 'elsewhere plain')

    @app.task(name='only_in_the_worker_foreign', base=celery.Task)
    def only_foreign() -> Any:
        note(current_context().uid, 'elsewhere foreign')

    class Only(TriggerTask):
        name = 'only_in_the_worker'

        def _run(self, context: Any) -> Any:
            note(context.uid, 'elsewhere', context['elsewhere']['amount'])
            return {'amount': context['elsewhere']['amount']}

    app.register_task(Only())


def _declare_context(app: Any) -> None:
    workflow = app.triggers.workflow('context:')

    @workflow.trigger_task(after=['log'])
    def log(context: Any) -> Any:
        with context.get_logger_context({'order': 7}) as logger:
            logger.info('information about %s', context.uid)
            logger.warning('a warning about %s', context.uid)

    @workflow.trigger_task(after=['log error'])
    def log_error(context: Any) -> Any:
        with context.get_logger_context({'order': 7}):
            raise with_context(ValueError(f'an error about {context.uid}'), {'page': 3})

    @workflow.trigger_task(after=['fire'], bind=True)
    def fires(self: Any, context: Any) -> Any:
        found = [
            context.fire('scanned', {'box': 1}),
            context.fire('scanned', {'box': 1}),
            context.fire('scanned', {'box': 2}),
        ]
        return {'ids': [firing.event_id for firing in found]}

    @workflow.trigger_task(after=[fires], and_every='scanned')
    def scan(context: Any) -> Any:
        note(context.uid, 'scan', context['scanned']['box'])

    @workflow.trigger_task(after=['count'])
    def count(context: Any) -> Any:
        return {
            'boxes': [kwargs['box'] for kwargs in context.firings('counted')],
            'filtered': context.filter_kwargs({'count': {'limit': int}}),
        }

    app.triggers.configure(
        {
            't_known': {'after': ['go'], 'run': 'integration_app.pass_by'},
            't_ghost': {'after': ['unknown'], 'run': 'integration.ghost'},
        },
        sessions='barrier:',
    )

    @app.task(name='integration_app.pass_by')
    def pass_by() -> None:
        pass

    app.triggers.configure(
        {
            't_first': {'after': ['go'], 'run': 'integration_app.link'},
            't_second': {'after': ['t_first'], 'run': 'integration_app.link'},
        },
        sessions='managers:',
    )

    @app.task(name='integration_app.link')
    def link() -> None:
        note(current_context().uid, 'link', os.getpid())

    joined = app.triggers.workflow('finalizing:')

    @joined.trigger_task(and_every='go')
    def step(context: Any) -> Any:
        note(context.uid, 'step')

    @joined.trigger_task(after=['t_step:failed'])
    def repair(context: Any) -> Any:
        note(context.uid, 'repair')

    @joined.trigger_task(after=['sessionFinalized'])
    def complete(context: Any) -> Any:
        note(context.uid, 'complete')

    @joined.trigger_task(after=[complete])
    def after_complete(context: Any) -> Any:
        note(context.uid, 'after_complete')


def _declare_questionnaire(app: Any) -> None:
    workflow = app.triggers.workflow('questionnaire:')

    @workflow.trigger_task(
        after=['firstPageReceived', 'questionnaireComplete'], trigger_name='t_importSubject'
    )
    def import_subject(context: Any) -> Any:
        note('questionnaire', context.uid, context.instance_name)
        return {'subject': context['firstPageReceived']['subject']}

    @workflow.trigger_task(
        after=[import_subject], and_every='pageReceived', trigger_name='t_importResponses'
    )
    def import_responses(context: Any) -> Any:
        note('questionnaire', context.uid, context.instance_name)
        note(context.uid, 'page', context['pageReceived']['page'])
        assert context['t_importSubject']['subject'] == context.uid
        return {'page': context['pageReceived']['page']}

    @workflow.trigger_task(
        after=[import_subject, 'pageReceived'], unless=['isEmbeddedApplication'],
        trigger_name='t_importBrowserMetadata',
    )
    def import_browser_metadata(context: Any) -> Any:
        note('questionnaire', context.uid, context.instance_name)

    @workflow.trigger_task(after=['sessionFinalized'], trigger_name='t_markComplete')
    def mark_complete(context: Any) -> Any:
        note('questionnaire', context.uid, context.instance_name)


assert FinalizingTriggerManager.finalizing
