"""The application of the chaos tests: tasks that do what the firing's kwargs say.

Each scenario has two prefixes, ``<scenario>-late:`` for tasks that acknowledge late, which
are run again after a crash, and ``<scenario>-early:`` for tasks that do not, which fail as
lost. What an instance comes to is decided by its kwargs alone, so that a test can tell from
the firings that were acknowledged how each session must end.

Every execution notes its start and its end in the journal ``executions``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import celery
from celery import signals

from celery_triggers import all_of
from celery_triggers.exceptions import StorageUnavailable
from tests.chaos import points
from tests.chaos.journal import Journal

#: How soon the machinery reacts here; the defaults are made for people's patience.
QUICK: dict[str, Any] = {
    'triggers_lease': 2.5,
    'triggers_dispatch_grace': 1.0,
    'triggers_sweep_interval': 0.3,
    'triggers_redeliver_after': 5.0,
    'triggers_max_deliveries': 1000,
}

_journal: dict[str, Journal] = {}


class Application(celery.Celery):
    """An application whose tasks are its own: several of them live in the test process."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{'shared': False, **options})


def create(
    *, broker: str, backend: str, storage: str, name: str, folder: str, **settings: Any
) -> celery.Celery:
    """Return the application with all its trigger tasks.

    Args:
        folder: Of the journals and of the orders to kill.
        settings: Of Celery's and of this package's, over :data:`QUICK`.
    """
    app = Application(
        'chaos', broker=broker, backend=backend, task_cls='celery_triggers:TriggerTask',
        set_as_current=False,
    )
    app.conf.update(
        task_default_queue=name,
        broker_connection_retry_on_startup=True,
        # A worker keeps trying for as long as a test keeps the broker away.
        broker_connection_max_retries=None,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_lost_wait=0.3,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        result_expires=3600,
        triggers_storage=storage,
        triggers_key_prefix=name,
        triggers_unheard='ignore',
        **QUICK,
    )
    app.conf.update(settings)
    _journal['of this process'] = Journal(folder)
    for kind, options in (
        ('late', {'acks_late': True}),
        ('early', {'acks_late': False}),
        # Not acknowledged late, but replayed by themselves, however often it takes.
        ('again', {'acks_late': False, 'replay_lost': True, 'max_retries': 1000}),
    ):
        _declare_chain(app, kind, options)
        _declare_join(app, kind, options)
        _declare_every(app, kind, options)
        _declare_failures(app, kind, options)
        _declare_retries(app, kind, options)
        _declare_replays(app, kind, options)
        _declare_pairs(app, kind, options)
    _declare_gated(app)
    return app


# ------------------------------------------------------------------- executions


class Execution:
    """One run of a task's code, noted at its start and once at its end."""

    def __init__(self, task: Any):
        header = task.request.headers['triggers']
        self.uid = str(header['uid'])
        self.facts = {
            'uid': self.uid,
            'instance': header['instance'],
            'attempt': header['attempt'],
            'task_id': header['task_id'],
            'run': os.urandom(6).hex(),
        }
        self.ended = False

    def begin(self) -> Execution:
        points.at('before code', self.uid)
        self._note('start')
        points.at('in code', self.uid)
        return self

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._note('end')
            points.at('after code', self.uid)

    def _note(self, what: str) -> None:
        _journal['of this process'].write('executions', what=what, **self.facts)

    def __enter__(self) -> Execution:
        return self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()


def work(plan: dict[str, Any]) -> None:
    """Do what a firing's kwargs say: sleep, compute, wait for a file or for a partner."""
    if plan.get('seconds'):
        time.sleep(plan['seconds'])
    if plan.get('compute'):
        until = time.monotonic() + plan['compute']
        while time.monotonic() < until:
            sum(range(100))
    if plan.get('until'):
        while not os.path.exists(plan['until']):
            time.sleep(0.01)


def fire_patiently(context: Any, trigger: str, kwargs: dict[str, Any]) -> None:
    """Fire, and again while the storage is away: that it raises would be the task's failure."""
    while True:
        try:
            context.fire(trigger, kwargs)
            return
        except StorageUnavailable:
            time.sleep(0.2)


def meet(folder: str, mine: str, other: str) -> None:
    """Come back at the same moment as the partner that is told the same the other way.

    One whose partner does not come, because messages overtook each other, goes on alone.
    """
    place = Path(folder)
    unfinished = place / f'.{mine}.{os.getpid()}'
    unfinished.write_text(repr(time.time() + 0.004))
    unfinished.replace(place / mine)
    until = time.monotonic() + 2
    while not (place / other).exists():
        if time.monotonic() > until:
            return
        time.sleep(0.0005)
    moment = max(float((place / name).read_text()) for name in (mine, other))
    while time.time() < moment:
        pass


# -------------------------------------------------------------------- scenarios


def _task(app: Any, scenario: str, kind: str, options: dict[str, Any]) -> Any:
    """Return a decorator that declares a trigger task of one scenario and kind."""
    workflow = app.triggers.workflow(f'{scenario}-{kind}:')

    def declare(name: str, **directives: Any) -> Any:
        def decorate(function: Any) -> Any:
            return workflow.trigger_task(
                trigger_name=f't_{name}', name=f'{scenario}_{kind}.{name}', bind=True,
                **{**options, **directives},
            )(function)

        return decorate

    return declare


def _plan(context: Any, *triggers: str) -> dict[str, Any]:
    """Return the kwargs of the first of these triggers that this instance received."""
    for trigger in triggers:
        if trigger in context.trigger_kwargs:
            return dict(context.trigger_kwargs[trigger])
    return {}


def _mourning(declare: Any, *tasks: str) -> None:
    """Declare a task that runs if one of these fails, so that failing cascades too."""
    for task in tasks:

        @declare(f'mourn_{task}', after=[f't_{task}:failed'], acks_late=True, replay_lost=False)
        def mourn(self: Any, context: Any) -> Any:
            with Execution(self):
                return {}


def _declare_chain(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``first``, then ``second``."""
    declare = _task(app, 'chain', kind, options)

    @declare('first', after=['go'])
    def first(self: Any, context: Any) -> Any:
        with Execution(self):
            work(_plan(context, 'go'))
            return {'seen': 1}

    @declare('second', after=['t_first'], acks_late=True, replay_lost=False)
    def second(self: Any, context: Any) -> Any:
        with Execution(self):
            return {'seen': context['t_first']['seen'] + 1}

    _mourning(declare, 'first')


def _declare_join(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``pick`` and ``pack`` run side by side, ``ship`` after both and a payment."""
    declare = _task(app, 'join', kind, options)

    @declare('pick', after=['ordered'])
    def pick(self: Any, context: Any) -> Any:
        with Execution(self):
            work(_plan(context, 'ordered'))
            fire_patiently(context, 'picked', {'by': 'pick'})
            return {'n': 1}

    @declare('pack', after=['ordered'])
    def pack(self: Any, context: Any) -> Any:
        with Execution(self):
            work(_plan(context, 'ordered'))
            return {'n': 2}

    @declare(
        'ship', after=all_of('t_pick', 't_pack', 'paid', 'picked'), unless=['cancelled'],
        acks_late=True, replay_lost=False,
    )
    def ship(self: Any, context: Any) -> Any:
        with Execution(self):
            return {'n': context['t_pick']['n'] + context['t_pack']['n']}

    _mourning(declare, 'pick', 'pack')


def _declare_every(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``open`` once, ``scan`` for each scan once it is open, ``tell`` for each scan made."""
    declare = _task(app, 'every', kind, options)

    @declare('open', after=['opened'], acks_late=True, replay_lost=False)
    def open_(self: Any, context: Any) -> Any:
        with Execution(self):
            return {}

    @declare('scan', after=['t_open'], and_every='scanned')
    def scan(self: Any, context: Any) -> Any:
        with Execution(self):
            work(_plan(context, 'scanned'))
            return {'number': context['scanned']['number']}

    @declare('tell', and_every='t_scan', acks_late=True, replay_lost=False)
    def tell(self: Any, context: Any) -> Any:
        with Execution(self):
            return {'number': context['t_scan']['number']}

    _mourning_each(declare, 'scan')


def _mourning_each(declare: Any, task: str) -> None:
    @declare(
        f'mourn_{task}', and_every=f't_{task}:failed', acks_late=True, replay_lost=False
    )
    def mourn(self: Any, context: Any) -> Any:
        with Execution(self):
            return {}


def _declare_failures(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``try`` raises; ``mourn_try`` runs because it did."""
    declare = _task(app, 'failure', kind, options)

    @declare('try', after=['go'])
    def attempt(self: Any, context: Any) -> Any:
        with Execution(self):
            plan = _plan(context, 'go')
            work(plan)
            if plan.get('fail', True):
                raise ValueError('as planned')
            return {}

    @declare('never', after=['t_try'])
    def never(self: Any, context: Any) -> Any:
        with Execution(self):
            return {}

    _mourning_each(declare, 'try')


def _declare_retries(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``by_hand`` and ``by_itself`` succeed at the attempt that the plan names."""
    declare = _task(app, 'retry', kind, options)

    # With retries after a lost run, ``max_retries`` also bounds the replays.
    @declare('by_hand', after=['go'], max_retries=1000)
    def by_hand(self: Any, context: Any) -> Any:
        execution = Execution(self).begin()
        try:
            plan = _plan(context, 'go')
            work(plan)
            wanted = int(plan.get('attempts', 1))
            attempt = int(self.request.headers['triggers']['attempt'])
        finally:
            # Before the retry: the next attempt may start while this one is being left.
            execution.end()
        if attempt < wanted:
            raise self.retry(countdown=plan.get('countdown', 0))
        return {'attempts': attempt}

    @declare(
        'by_itself', after=['go'], max_retries=1000, autoretry_for=(KeyError,),
        retry_backoff=0.2, retry_backoff_max=1, retry_jitter=True,
    )
    def by_itself(self: Any, context: Any) -> Any:
        with Execution(self):
            plan = _plan(context, 'go')
            work(plan)
            attempt = int(self.request.headers['triggers']['attempt'])
            if attempt < int(plan.get('attempts', 1)):
                raise KeyError('as planned')
            return {'attempts': attempt}

    @declare('both', after=['t_by_hand', 't_by_itself'], acks_late=True, replay_lost=False)
    def both(self: Any, context: Any) -> Any:
        with Execution(self):
            return {}

    _mourning(declare, 'by_hand', 'by_itself')


def _declare_replays(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``check`` replays itself with another sum until the sum is right."""
    declare = _task(app, 'replay', kind, {**options, 'max_retries': 1000})

    @declare('check', after=['go'])
    def check(self: Any, context: Any) -> Any:
        with Execution(self):
            plan = _plan(context, 'go')
            work(plan)
            left = int(plan.get('replays', 1))
        if left > 0:
            following = {'go': {**plan, 'replays': left - 1}}
            raise self.replay(following, countdown=plan.get('countdown', 0))
        return {'left': left}

    @declare('after_check', after=['t_check'], acks_late=True, replay_lost=False)
    def after_check(self: Any, context: Any) -> Any:
        with Execution(self):
            return {}

    _mourning_each(declare, 'check')


def _declare_pairs(app: Any, kind: str, options: dict[str, Any]) -> None:
    """``left`` and ``right``, on queues of their own, end at the same moment; then ``body``."""
    declare = _task(app, 'pair', kind, options)
    queue = app.conf.task_default_queue

    def half(mine: str, other: str) -> None:
        @declare(mine, after=['go'], queue=f'{queue}-{mine}')
        def run(self: Any, context: Any) -> Any:
            with Execution(self):
                plan = _plan(context, 'go')
                number = plan['number']
                meet(plan['place'], f'{mine}-{number}', f'{other}-{number}')
                return {'at': time.time()}

    half('left', 'right')
    half('right', 'left')

    @declare('body', after=['t_left', 't_right'], acks_late=True, replay_lost=False)
    def body(self: Any, context: Any) -> Any:
        with Execution(self):
            left, right = context['t_left']['at'], context['t_right']['at']
            return {'apart': abs(left - right)}


# ------------------------------------------------------------------ in a worker


def watch(folder: str) -> None:
    """Note what a worker's parent receives, and tell its children what they are."""
    journal = Journal(folder)

    def received(request: Any = None, **_: Any) -> None:
        header = request.request_dict.get('triggers')
        if isinstance(header, dict):
            journal.write(
                'received', uid=header['uid'], instance=header['instance'],
                attempt=header['attempt'], task_id=request.id,
            )

    def forked(**_: Any) -> None:
        points.become('child')

    signals.task_received.connect(received, weak=False)
    signals.worker_process_init.connect(forked, weak=False)


def _declare_gated(app: Any) -> None:
    """Plain tasks for gates: ``part`` in a chord's header, ``body`` after it."""
    late = {'bind': True, 'acks_late': True, 'reject_on_worker_lost': True}

    @app.task(name='gates_late.part', **late)
    def part(self: Any, number: int, plan: dict[str, Any]) -> int:
        with Execution(self):
            work(plan)
            return number

    @app.task(name='gates_late.body', **late)
    def body(self: Any, numbers: list[int], plan: dict[str, Any]) -> int:
        with Execution(self):
            work(plan)
            return sum(numbers)
