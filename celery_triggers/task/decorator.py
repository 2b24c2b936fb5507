"""The decorator: what it says, and the Celery task and the declaration it makes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

from celery import Task
from celery.app import shared_task
from celery.local import PromiseProxy, Proxy

from celery_triggers.engine.forms import refuse_ambiguous_unless
from celery_triggers.engine.names import plain
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.task.task import TriggerTask
from celery_triggers.task.workflow import Declaration

__all__ = ['Spoken', 'declare', 'declare_shared']

_DIRECTIVES = ('after', 'unless', 'and_every', 'with_params', 'using', 'within')
_OWN = (*_DIRECTIVES, 'sessions', 'trigger_name')


class Spoken:
    """What ``@app.trigger_task(...)`` was told, sorted and checked as far as can be.

    Attributes:
        directives: Those that were given, with their Python names.
        options: The rest, which are Celery's.
    """

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]):
        if args:
            raise TypeError(
                '@app.trigger_task(...) needs at least after= or and_every=, '
                f'and takes no positional argument, not {args[0]!r}'
            )
        given = dict(options)
        self.sessions = check_sessions(given.pop('sessions', ''))
        self.trigger_name: str | None = given.pop('trigger_name', None)
        self.directives = {name: given.pop(name) for name in _DIRECTIVES if name in given}
        self.options = given
        self._refuse_misspelled()
        self._refuse_unconditional()
        refuse_ambiguous_unless(self.directives.get('unless'), self.trigger_name)

    def _refuse_misspelled(self) -> None:
        """Refuse what Celery would keep as an attribute of the task and never look at."""
        for name in self.options:
            meant = difflib.get_close_matches(name, _OWN, n=1, cutoff=0.8)
            if meant and not hasattr(TriggerTask, name):
                raise TypeError(f'@app.trigger_task has no {name}=; did you mean {meant[0]}=?')

    def _refuse_unconditional(self) -> None:
        if self.directives.get('after') is None and self.directives.get('and_every') is None:
            raise InvalidConfiguration(
                'it can never run: give it after= or and_every=', task=self.trigger_name
            )

    def declaration(self, name: str, task: Any, target: Callable[[], Any]) -> Declaration:
        """Return the declaration for a task with this default name."""
        return Declaration(
            self.sessions, self.trigger_name or name, self.directives, task=task, target=target
        )


def check_sessions(prefix: Any) -> str:
    """Return the prefix of the uids that trigger tasks are for.

    Raises:
        InvalidConfiguration: It is no string.
    """
    if not isinstance(prefix, str):
        raise InvalidConfiguration(
            f'sessions= is one prefix of uids, a string such as "order:", not {prefix!r}'
        )
    return plain(prefix)


def declare(app: Any, spoken: Spoken, target: Any) -> tuple[Any, Declaration]:
    """Return what takes the place of a decorated function, class or task, and what it says.

    Raises:
        TypeError: It is none of these, or a task that has its options already.
    """
    if issubclass(type(target), (Proxy, Task)):
        return target, _declare_task(spoken, target)
    if inspect.isclass(target):
        promise = _promise_of_class(app, target, spoken.options)
        name = target.__name__
        return target, spoken.declaration(
            f't_{name[0].lower()}{name[1:]}', target, lambda: promise
        )
    if not callable(target):
        raise TypeError(f'@app.trigger_task decorates functions and classes, not {target!r}')
    task = _task_of_function(app, target, dict(spoken.options))
    return task, spoken.declaration(f't_{target.__name__}', task, lambda: task)


def declare_shared(spoken: Spoken, target: Any) -> tuple[Any, Declaration]:
    """As :func:`declare`, with a task that every application has.

    Raises:
        TypeError: It is no function, or a shared task that has its options already.
    """
    if issubclass(type(target), (Proxy, Task)):
        return target, _declare_task(spoken, target)
    if inspect.isclass(target) or not callable(target):
        raise TypeError(f'@shared_trigger_task decorates functions, not {target!r}')
    options = dict(spoken.options)
    adapter = _context_adapter(target, bind=options.pop('bind', False))
    make: Any = shared_task
    shared = make(bind=True, takes_context=True, base=TriggerTask, **options)(adapter)
    # Celery's own would have to make an application to tell its name.
    task = Proxy(shared._get_current_object, name=target.__name__)
    return task, spoken.declaration(f't_{target.__name__}', task, lambda: task)


def _declare_task(spoken: Spoken, task: Any) -> Declaration:
    """Return the declaration for what is a task already, as with stacked decorators."""
    if spoken.options:
        raise TypeError(f'{sorted(spoken.options)}: the task has its options already')
    name = spoken.trigger_name
    if name is None:
        called: str = task.__name__ if issubclass(type(task), Proxy) else task.name
        name = f't_{called.rpartition(".")[2]}'
    return spoken.declaration(name, task, lambda: task)


def _check_signature(function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Refuse code that a worker could not call with these arguments.

    Raises:
        TypeError: It takes others.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Written in C, without a signature to look at.
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f'a trigger task is called with ({", ".join(arguments)}), which '
            f'{function.__qualname__}{signature} does not take; what was fired is in '
            'context[<trigger>]'
        ) from None


def _check_class(class_: type[TriggerTask]) -> None:
    if class_._run is not TriggerTask._run:
        _check_signature(class_._run, ('self', 'context'))
    elif class_.run is TriggerTask.run:
        raise TypeError(f'{class_.__name__} must define _run(self, context)')
    else:
        try:
            _check_signature(class_.run, ('self',))
        except TypeError as exc:
            raise TypeError(f'{class_.__name__} must define _run(self, context): {exc}') from None


def _task_of_function(app: Any, function: Callable[..., Any], options: dict[str, Any]) -> Any:
    adapter = _context_adapter(function, bind=options.pop('bind', False))
    options.setdefault('base', _trigger_task_of(app))
    # Celery shares the tasks of one application with every other one of the process.
    # A trigger task belongs to the workflows of this one.
    options.setdefault('shared', False)
    return app.task(bind=True, takes_context=True, **options)(adapter)


def _context_adapter(function: Callable[..., Any], *, bind: bool) -> Callable[..., Any]:
    """Return the ``run`` of a trigger task made from a function of a context.

    Raises:
        TypeError: The function does not take what it would be called with.
    """
    _check_signature(function, ('self', 'context') if bind else ('context',))

    def run(self: TriggerTask, *args: Any, trigger_kwargs: Any = None, **kwargs: Any) -> Any:
        context, rest = self._context_and_rest(args, {'trigger_kwargs': trigger_kwargs})
        given = (self, context) if bind else (context,)
        # A signature that a gate holds, say, has arguments of its own.
        return function(*given, *rest, **kwargs)

    for name in ('__name__', '__qualname__', '__module__', '__doc__'):
        setattr(run, name, getattr(function, name, None))
    returns = _return_annotation(function)
    if returns is not inspect.Signature.empty:
        # pydantic=True dumps what is annotated as a model.
        run.__annotations__ = {'return': returns}
    return run


def _return_annotation(function: Callable[..., Any]) -> Any:
    """Return the annotation itself where it is written as a string."""
    try:
        annotation = inspect.signature(function).return_annotation
    except ValueError:
        return inspect.Signature.empty
    try:
        return get_type_hints(function).get('return', annotation)
    except (NameError, TypeError, AttributeError):
        # A name in some annotation is not known (yet); nothing else depends on it.
        return annotation


def _trigger_task_of(app: Any) -> type:
    """Return a task class for trigger tasks that keeps what the application's class has."""
    own: type = app.Task
    if issubclass(own, TriggerTask):
        return own
    return type('TriggerTask', (TriggerTask, own), {'abstract': True})


def _promise_of_class(app: Any, class_: type, options: dict[str, Any]) -> Any:
    if not issubclass(class_, TriggerTask):
        raise TypeError(
            f'{class_.__name__} must derive from celery_triggers.TriggerTask and define '
            '_run(self, context)'
        )
    _check_class(class_)
    promise = PromiseProxy(partial(_register_class, app, class_, options))
    if app.finalized:
        promise._get_current_object()
    else:
        app._pending.append(promise)
    return promise


def _register_class(app: Any, class_: type, options: dict[str, Any]) -> Any:
    name = options.get('name') or getattr(class_, 'name', None)
    name = name or app.gen_task_name(class_.__name__, class_.__module__)
    if not app.finalized:
        # register_task() would, and come back here for this very class.
        app.finalize(auto=True)
    if name in app._tasks:
        return app._tasks[name]
    members = {**options, 'name': name, '__module__': class_.__module__}
    return app.register_task(type(class_.__name__, (class_,), members)(), **options)
