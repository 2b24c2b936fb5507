"""What a trigger task runs: a Celery task by name, or a signature with arguments of its own.

A signature is the mapping that Celery serializes: ``{"task", "args", "kwargs", "options",
"subtask_type", "immutable"}``. Its arguments may hold placeholders, ``{"$kwarg": [trigger,
name]}``, in whose place the fired values come when it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery_triggers.engine.conditions import Kwarg
from celery_triggers.engine.forms import parse_kwarg
from celery_triggers.engine.names import plain, problem_with
from celery_triggers.exceptions import InvalidConfiguration, TriggersError

__all__ = [
    'END', 'FIRE', 'GATE', 'RUN', 'SPOKEN', 'celery_task', 'delay_of', 'filled', 'marked',
    'parse_run', 'placeholders',
]

#: The task that puts a canvas in its own place: a canvas is no task that could be sent.
RUN = 'celery_triggers.run'

#: The task that ends the result of a gate that will not run.
END = 'celery_triggers.end'

#: The task that fires a trigger.
FIRE = 'celery_triggers.fire'

#: The ``subtask_type`` of a gate.
GATE = 'celery_triggers.gate'

#: The option of a signature that holds what a gate was told.
SPOKEN = 'triggers_gate'

#: What else a signature can be besides a task.
CANVASES = frozenset({'chain', 'group', 'chord', 'xmap', 'xstarmap', 'chunks', GATE})

KINDS: dict[str, tuple[type, ...]] = {
    'args': (list, tuple),
    'kwargs': (Mapping,),
    'options': (Mapping,),
    'subtask_type': (str, type(None)),
    'immutable': (bool,),
    'chord_size': (int, type(None)),
}


def parse_run(value: Any) -> str | dict[str, Any]:
    """Read what a trigger task runs.

    Returns:
        A task's name, or a signature without what is empty in it.

    Raises:
        InvalidConfiguration: It is neither.
    """
    if not isinstance(value, Mapping):
        return plain(_checked_name(value))
    call = dict(value)
    name = plain(_checked_name(call.pop('task', None)))
    unknown = sorted(map(str, call.keys() - KINDS.keys()))
    if unknown:
        raise InvalidConfiguration(
            f'{", ".join(unknown)} in a signature is not known; "task", '
            f'{", ".join(map(repr, KINDS))} are'
        )
    for key, kinds in KINDS.items():
        wrong_bool = isinstance(call.get(key), bool) and bool not in kinds
        if key in call and (wrong_bool or not isinstance(call[key], kinds)):
            raise InvalidConfiguration(f'"{key}" of the signature of {name!r} is {call[key]!r}')
    if call.get('subtask_type') not in {None, *CANVASES}:
        raise InvalidConfiguration(f'{call["subtask_type"]!r} is no canvas that Celery knows')
    _check_delay(call.get('options') or {})
    list(placeholders(call))
    given = {key: call[key] for key in KINDS if call.get(key)}
    return {'task': name, **given} if given else name


def _checked_name(name: Any) -> str:
    problem = problem_with(name)
    if problem:
        raise InvalidConfiguration(
            f'the name of a Celery task or a signature is wanted; it {problem}'
        )
    return str(name)


def _check_delay(options: Mapping[str, Any]) -> None:
    countdown = options.get('countdown')
    if options.get('eta') is not None:
        raise InvalidConfiguration(
            'a signature under "run" has no date of its own ("eta"): the session fires when '
            'it is time'
        )
    number = isinstance(countdown, (int, float)) and not isinstance(countdown, bool)
    if countdown is not None and not number:
        raise InvalidConfiguration(f'"countdown" is a number of seconds, not {countdown!r}')


def celery_task(run: str | Mapping[str, Any]) -> str:
    """Return the name of the Celery task whose message is sent."""
    if isinstance(run, str):
        return run
    return RUN if run.get('subtask_type') else str(run['task'])


def delay_of(run: str | Mapping[str, Any]) -> int:
    """Return in how many milliseconds after its release it may run."""
    if isinstance(run, str):
        return 0
    return max(0, int(float((run.get('options') or {}).get('countdown') or 0) * 1000))


def placeholders(value: Any) -> Iterator[Kwarg]:
    """Yield the placeholders in arguments, at any depth; those of a gate in it are its own.

    Raises:
        InvalidConfiguration: One is not of the form ``{"$kwarg": [trigger, name]}``.
    """
    if isinstance(value, Kwarg):
        yield value
    elif isinstance(value, Mapping):
        if '$kwarg' in value:
            yield parse_kwarg(value)
        elif value.get('subtask_type') != GATE:
            for member in value.values():
                yield from placeholders(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from placeholders(member)


def marked(value: Any) -> Any:
    """Return arguments, or a signature, with what any serializer can take for placeholders."""
    if isinstance(value, Kwarg):
        return value.to_json()
    if hasattr(value, '__json__') and not isinstance(value, Mapping):
        # What a canvas iterates over.
        return marked(value.__json__())
    if type(value) in (list, tuple):
        return type(value)(marked(member) for member in value)
    if type(value) is dict or (isinstance(value, Mapping) and 'subtask_type' in value):
        return {key: marked(member) for key, member in value.items()}
    return value


def filled(value: Any, kwargs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return arguments with the fired values in the place of placeholders.

    Args:
        kwargs: ``{trigger: kwargs}``, as an instance has received them.

    Raises:
        TriggersError: A value was not fired.
    """
    if isinstance(value, Mapping):
        if '$kwarg' in value:
            return _value_of(parse_kwarg(value), kwargs)
        if value.get('subtask_type') == GATE:
            return value
        return {key: filled(member, kwargs) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [filled(member, kwargs) for member in value]
    return value


def _value_of(kwarg: Kwarg, kwargs: Mapping[str, Mapping[str, Any]]) -> Any:
    received = kwargs.get(kwarg.key)
    if received is None or kwarg.name not in received:
        what = 'was not received' if received is None else f'has only: {", ".join(received)}'
        raise TriggersError(
            f'an argument is to be {kwarg.name!r} of {kwarg.key!r}, which {what or "nothing"}'
        )
    return received[kwarg.name]
