"""Tasks and workflows of the tests of gates, which are added to the integration application.

Plain tasks are named ``canvas.<name>``. Sessions of gates begin with ``canvas:``, and those
in which trigger tasks build canvases with ``within:``.
"""

# ruff: noqa: C901 - one declaration after the other is not complex

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

import celery
import integration_app
from celery import chain, chord, group

from celery_triggers import TriggerTask, current_context, gate, kwarg

#: Beside what a task was given, what its request says of where it came from.
REQUEST = ('id', 'root_id', 'parent_id', 'group', 'expires', 'stamps', 'correlation_id')


class Canvas:
    """What the canvases of one session are made of: plain tasks, and gates of this session."""

    def __init__(self, worker: Any, uid: str, *, gated: bool = True):
        self._worker = worker
        self._gated = gated
        self.uid = uid

    def __getattr__(self, name: str) -> Any:
        return self._worker.app.tasks[f'canvas.{name}']

    def gate(self, sig: Any, **options: Any) -> Any:
        """Return a gate that waits for ``go``; the signature itself in a canvas without gates."""
        if not self._gated:
            return sig
        return gate(sig, **{'after': ['go'], 'uid': self.uid, **options})

    def fire(self, trigger: str = 'go', kwargs: Any = None) -> Any:
        return self._worker.app.triggers.fire(self.uid, trigger, kwargs)

    def go(self, waiting: int = 1, **kwargs: Any) -> None:
        """Fire ``go`` when so many gates wait."""
        self.wait(waiting)
        self.fire('go', kwargs)

    def wait(self, waiting: int = 1) -> None:
        def waits() -> bool:
            found = self._worker.storage(self.uid)
            return sum(i.status == 'unstarted' for i in found) >= waiting

        self._worker.wait_for(waits, f'{waiting} gates of {self.uid} wait')


def add_canvas_tasks(app: Any) -> None:
    _add_plain_tasks(app)
    _add_callbacks(app)
    _add_tasks_with_context(app)
    _add_builders(app)
    _add_runs(app)
    # Not the one of the settings, in which the journals are.
    app.conf.result_backend = app.conf.get('canvas_result_backend') or app.conf.result_backend


def flat(values: Any) -> Iterable[Any]:
    """Return what a canvas joined: a group in it may be a list."""
    if not isinstance(values, (list, tuple)):
        return [values]
    return [number for value in values for number in flat(value)]


def _add_plain_tasks(app: Any) -> None:
    @app.task(name='canvas.add')
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name='canvas.foreign_add', base=celery.Task)
    def foreign_add(x: int, y: int) -> int:
        return x + y

    @app.task(name='canvas.total')
    def total(numbers: Any) -> int:
        return sum(flat(numbers))

    @app.task(name='canvas.echo')
    def echo(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {'args': list(args), 'kwargs': kwargs}

    @app.task(name='canvas.give')
    def give(value: Any = None) -> Any:
        return value

    @app.task(name='canvas.request', bind=True)
    def request(self: Any, *args: Any) -> dict[str, Any]:
        delivery = self.request.delivery_info
        return {
            **{name: getattr(self.request, name) for name in REQUEST},
            'queue': delivery['routing_key'],
            'priority': delivery['priority'],
            'at': time.time(),
            'args': list(args),
        }

    @app.task(name='canvas.broken')
    def broken(*_: Any) -> None:
        raise LookupError('broken')

    @app.task(name='canvas.noted')
    def noted(key: str, value: Any = None) -> Any:
        integration_app.note(key, 'ran')
        return value

    @app.task(name='canvas.noted_last')
    def noted_last(value: Any, key: str) -> Any:
        integration_app.note(key, 'ran')
        return value

    @app.task(name='canvas.ignored', ignore_result=True)
    def ignored(key: str) -> str:
        integration_app.note(key, 'ran')
        return 'unseen'

    @app.task(name='canvas.broken_at_first')
    def broken_at_first(value: Any, key: str, times: int) -> Any:
        integration_app.note(key, 'ran')
        if len(integration_app.lines(key)) <= times:
            raise LookupError('broken')
        return value

    class Dying(celery.Task):
        """Its worker dies once: when what follows has been applied, before the ack."""

        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            integration_app.note(f'{retval} predecessor', 'ran')
            if len(integration_app.lines(f'{retval} predecessor')) == 1:
                os.killpg(os.getpgid(0), signal.SIGKILL)

    @app.task(name='canvas.dying', base=Dying, acks_late=True, reject_on_worker_lost=True)
    def dying(key: str) -> str:
        return key


def _add_callbacks(app: Any) -> None:
    @app.task(name='canvas.mourn')
    def mourn(task_id: str, *, key: str = '') -> str:
        """An error callback of the old style."""
        integration_app.note(key or task_id, 'old', task_id)
        return task_id

    @app.task(name='canvas.mourn_anew')
    def mourn_anew(request: Any, exc: Any, traceback: Any, *, key: str = '') -> None:
        """One of the new style."""
        integration_app.note(key or request.id, 'new', request.id, type(exc).__name__)


def _add_tasks_with_context(app: Any) -> None:
    workflow = app.triggers.workflow('canvas:')

    @workflow.trigger_task(after=['t_gate'])
    def follow(context: Any) -> Any:
        """Follow a gate of this name."""
        return dict(context['t_gate'])

    for ending in ('failed', 'abandoned', 'expired', 'revoked'):
        name = f'follow_{ending}'

        @workflow.trigger_task(after=[f't_gate:{ending}'], trigger_name=f't_{name}', name=name)
        def follow_end(context: Any) -> Any:
            (kwargs,) = context.trigger_kwargs.values()
            return dict(kwargs)

    @app.trigger_task(after=['nothing fires it'], sessions='aside:', name='canvas.with_context')
    def with_context(context: Any, *previous: Any, **kwargs: Any) -> Any:
        return {
            'uid': context.uid, 'fired': dict(context.trigger_kwargs), 'previous': list(previous),
            'kwargs': kwargs,
        }

    class InClass(TriggerTask):
        name = 'canvas.in_class'

        def _run(self, context: Any, previous: Any = None, *, times: int = 1) -> Any:
            return {'fired': dict(context.trigger_kwargs), 'times': [previous] * times}

    app.register_task(InClass())

    @app.trigger_task(
        after=['nothing fires it'], sessions='aside:', name='canvas.moody', bind=True
    )
    def moody(self: Any, context: Any, previous: Any = None, mood: str = '') -> Any:
        integration_app.note(context.uid, mood, self.request.retries, context.instance_name)
        if mood == 'skip':
            raise self.skip({'because': 'closed'})
        if mood == 'replay' and context.task_instance.depth == 0:
            raise self.replay({'go': {'v': 2}})
        if mood == 'retry' and self.request.retries == 0:
            raise self.retry(countdown=0)
        return [previous, context['go']['v']]


def _add_builders(app: Any) -> None:
    """Tasks that apply gates, or put them in their own place."""

    @app.task(name='canvas.replaced', bind=True)
    def replaced(self: Any, canvas: Mapping[str, Any]) -> Any:
        raise self.replace(app.signature(canvas))

    @app.task(name='canvas.apply', bind=True)
    def apply(self: Any, canvas: Mapping[str, Any]) -> str:
        return str(app.signature(canvas).apply_async().id)

    within = app.triggers.workflow('within:')

    @within.trigger_task(after=['apply'])
    def applies(context: Any) -> Any:
        """Apply gates that name no session."""
        add = app.tasks['canvas.add']
        alone = gate(add.s(1, 1), after=['go']).apply_async()
        linked = chain(
            add.s(1, 1), gate(add.s(1), after=['go'], trigger_name='t_linked')
        ).apply_async()
        return {'alone': alone.id, 'chain': linked.id}

    @within.trigger_task(after=['replace'], bind=True)
    def replaces(self: Any, context: Any) -> Any:
        give, broken = app.tasks['canvas.give'], app.tasks['canvas.broken']
        made = {
            'gate': lambda: gate(give.s({'n': 1}), after=['go']),
            'chain': lambda: chain(give.s({'n': 2}), gate(give.s(), after=['go'])),
            'gated chain': lambda: gate(chain(give.s({'n': 3}), give.s()), after=['go']),
            'broken gate': lambda: gate(broken.s(), after=['go']),
            'abandoned gate': lambda: gate(give.s({'n': 4}), after=['never'], unless=['go']),
        }
        raise self.replace(made[context['replace']['by']]())

    @within.trigger_task(after=['t_replaces'])
    def after_replaces(context: Any) -> Any:
        return dict(context['t_replaces'])

    @within.trigger_task(after=['t_replaces:failed'])
    def after_failure(context: Any) -> Any:
        return dict(context['t_replaces:failed'])

    @app.task(name='canvas.where')
    def where() -> list[str]:
        context = current_context()
        return [context.uid, context.instance_name]


def _add_runs(app: Any) -> None:
    """Trigger tasks that run signatures and canvases; each waits for its own name."""
    add, broken, echo, give, total, with_context = (
        app.tasks[f'canvas.{name}']
        for name in ('add', 'broken', 'echo', 'give', 'total', 'with_context')
    )

    def v(name: str) -> Any:
        return kwarg(name, 'v')

    runs = {
        'plain': echo.s(1, v('plain'), x=[{'y': v('plain')}]),
        'json': {'task': 'canvas.add', 'args': [1, {'$kwarg': ['json', 'v']}]},
        'code': with_context.s('own', x=v('code')),
        'queued': app.tasks['canvas.request'].s().set(
            queue=f'{app.conf.task_default_queue}-other', priority=3
        ),
        'chain': chain(add.s(1, v('chain')), add.s(2)),
        'group': group(add.s(1, v('group')), add.s(2, v('group'))),
        'chord': chord([add.s(1, v('chord')), add.s(2, 2)], total.s()),
        'gated': chain(
            add.s(1, v('gated')), gate(add.s(kwarg('more', 'v')), after=['more']), add.s(1)
        ),
        'gated_last': chain(add.s(1, v('gated_last')), gate(add.s(1), after=['more'])),
        'gated_chord': chord(
            [add.s(1, v('gated_chord')), gate(add.s(2, 2), after=['more'])], total.s()
        ),
        'broken_chain': chain(give.s(v('broken_chain')), broken.s(), give.s()),
        'broken_group': group(give.s(v('broken_group')), broken.s()),
        'broken_chord': chord([give.s(v('broken_chord')), broken.s()], total.s()),
        'broken_body': chord([give.s(v('broken_body')), give.s(1)], broken.s()),
        'broken_gate': chain(
            give.s(v('broken_gate')), gate(broken.s(), after=['more']), give.s()
        ),
        'abandoned_gate': chain(
            give.s(v('abandoned_gate')), gate(give.s(), after=['never'], unless=['more'])
        ),
        'without_value': chain(add.s(1, kwarg('without_value', 'other')), add.s(1)),
    }
    app.triggers.configure(
        {f't_{name}': {'after': [name], 'run': run} for name, run in runs.items()},
        sessions='runs:',
    )
