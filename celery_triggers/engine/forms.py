"""How conditions are written: in Python, and in JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from celery_triggers.engine.conditions import (
    AllOf,
    AnyOf,
    AtLeast,
    Branch,
    Condition,
    Kwarg,
    On,
    OnTask,
    unique,
)
from celery_triggers.engine.filters import check_filter
from celery_triggers.engine.names import plain, problem_with
from celery_triggers.exceptions import InvalidConfiguration

__all__ = [
    'all_of', 'any_of', 'at_least', 'kwarg', 'on', 'parse_condition', 'refuse_ambiguous_unless',
]


def all_of(*members: Any) -> Condition:
    """Return a condition that holds when all members hold.

    Args:
        members: Trigger names, conditions, or tasks, which stand for their triggers.

    Raises:
        InvalidConfiguration: A member is none of these.
    """
    return AllOf(unique(_member(member) for member in members))


def any_of(*members: Any) -> Condition:
    """Return a condition that holds when one member holds (see :func:`all_of`)."""
    return AnyOf(unique(_member(member) for member in members))


def at_least(count: int, *members: Any) -> Condition:
    """Return a condition that holds when ``count`` of the members hold.

    Raises:
        InvalidConfiguration: ``count`` is not between 1 and the number of members, or a
            member is neither a trigger name nor a condition.
    """
    different = unique(_member(member) for member in members)
    _check_count(count, different)
    return AtLeast(different, count)


def on(trigger: Any, *, where: str | None = None, as_: str | None = None, times: Any = None) -> Any:
    """Return a condition that holds when a trigger was fired, or fired so.

    Args:
        trigger: Its name, or a task, which stands for its trigger.
        where: An expression in CEL over the firing's kwargs; only firings that match
            are received. It needs the extra ``filters``.
        as_: The key of what was received, in ``context[...]``; the trigger's name by
            default. Two leaves on one trigger need it.
        times: How many firings the session must have seen: a number, or
            :func:`kwarg`.

    Raises:
        InvalidConfiguration: An argument is none of these.
    """
    facts = (
        None if where is None else check_filter(where),
        None if as_ is None else _name(as_, '"as"'),
        _times(times),
    )
    kind = type(trigger)
    if issubclass(kind, (str, bool, int, float, list, tuple, set, frozenset, Mapping, Condition)):
        return On(_name(trigger, 'a trigger name'), *facts)
    return OnTask(trigger, *facts)


def kwarg(key: str, name: str) -> Kwarg:
    """Return a value that another trigger's kwargs will give.

    Args:
        key: The trigger's name, or the ``as`` of its leaf.
        name: The name of the value.

    Raises:
        InvalidConfiguration: They are no names.
    """
    return Kwarg(_name(key, 'the trigger of a kwarg'), _name(name, 'the name of a kwarg'))


def parse_kwarg(value: Mapping[Any, Any]) -> Kwarg:
    """Read ``{"$kwarg": [trigger, name]}``.

    Raises:
        InvalidConfiguration: It is something else.
    """
    match dict(value):
        case {'$kwarg': [key, name], **rest} if not rest:
            return kwarg(key, name)
    raise InvalidConfiguration(f'{{"$kwarg": [trigger, name]}} is wanted, not {dict(value)!r}')


def _times(value: Any) -> int | Kwarg | None:
    if value is None or isinstance(value, Kwarg):
        return value
    if isinstance(value, Mapping):
        return parse_kwarg(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfiguration(
            f'"times" is a whole number from 1 on, or {{"$kwarg": [trigger, name]}}, not {value!r}'
        )
    # Once is what every leaf wants.
    return None if value == 1 else int(value)


def _name(value: Any, what: str) -> str:
    problem = problem_with(value)
    if problem:
        raise InvalidConfiguration(f'{what} {problem}: {value!r}')
    return plain(value)


def _check_count(count: Any, members: Collection[Any]) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(members):
        raise InvalidConfiguration(
            f'atLeast must be a whole number from 1 to {len(members)}, '
            f'the number of its different members, not {count!r}'
        )


def _member(value: Any) -> Condition:
    # By type(): isinstance() would look behind the promise of a task.
    kind = type(value)
    if issubclass(kind, Condition):
        return cast(Condition, value)
    if issubclass(kind, Mapping):
        return _parse_mapping(value)
    if issubclass(kind, (list, tuple, set, frozenset)):
        return parse_condition(value)
    if issubclass(kind, type) or (kind.__module__ != 'builtins' and not issubclass(kind, str)):
        return OnTask(value)
    return On(_name(value, 'a trigger name'))


# What may stand beside a condition in ``&`` and ``|`` is what may be its member.
Condition.read = staticmethod(_member)  # type: ignore[method-assign]


def parse_condition(value: Any) -> Condition:
    """Read a condition.

    Args:
        value: A :class:`Condition`; a list, tuple or set (all of its members); or a
            mapping: ``{"any": [...]}``, ``{"all": [...]}``,
            ``{"atLeast": n, "of": [...]}``, ``{"trigger": name}``, the last perhaps with
            ``"where"``, ``"as"`` and ``"times"``. They nest.

    Raises:
        InvalidConfiguration: It is none of these.
    """
    if isinstance(value, Condition):
        return value
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if isinstance(value, str):
        raise InvalidConfiguration(f'a list of trigger names is wanted: write [{value!r}]')
    if isinstance(value, (set, frozenset)):
        # A set has no order of its own; a sorted one gives the same stored content.
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return AllOf(unique(_member(member) for member in value))
    raise InvalidConfiguration(
        'a condition is a list of trigger names, or {"any": [...]}, {"all": [...]} or '
        f'{{"atLeast": n, "of": [...]}}, not {value!r}'
    )


def _parse_mapping(value: Mapping[Any, Any]) -> Condition:
    match dict(value):
        case {'any': members, **rest} if not rest:
            return AnyOf(_members(members, 'any'))
        case {'all': members, **rest} if not rest:
            return AllOf(_members(members, 'all'))
        case {'atLeast': count, 'of': members, **rest} if not rest:
            parsed = _members(members, 'of')
            _check_count(count, parsed)
            return AtLeast(parsed, count)
        case {'trigger': str() as trigger, **rest} if rest.keys() <= {'where', 'as', 'times'}:
            return cast(Condition, on(
                trigger, where=rest.get('where'), as_=rest.get('as'), times=rest.get('times')
            ))
        case {'trigger': str(), **rest}:
            unknown = _listed(rest.keys() - {'where', 'as', 'times'})
            raise InvalidConfiguration(
                f'{unknown} beside "trigger" is not known; "where", "as" and "times" are'
            )
        case {'trigger': trigger}:
            raise InvalidConfiguration(f'"trigger" wants the name of one, not {trigger!r}')
    raise InvalidConfiguration(
        f'{_listed(value)} is no condition; write {{"any": [...]}}, {{"all": [...]}} or '
        '{"atLeast": n, "of": [...]}'
    )


def _members(value: Any, key: str) -> tuple[Condition, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise InvalidConfiguration(f'"{key}" wants a list of at least one member, not {value!r}')
    ordered = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
    return unique(_member(member) for member in ordered)


def check_members(condition: Condition) -> None:
    """Refuse a condition with an empty one inside it, which cannot be written down.

    Raises:
        InvalidConfiguration: It has one.
    """
    for member in condition.members if isinstance(condition, Branch) else ():
        if isinstance(member, Branch) and not member.members:
            raise InvalidConfiguration('a condition inside another one must not be empty')
        check_members(member)


def _listed(keys: Iterable[Any]) -> str:
    return ', '.join(repr(key) for key in keys)


def refuse_ambiguous_unless(unless: Any, task: str | None) -> None:
    """Refuse a plain list of several triggers under ``unless`` in code.

    Raises:
        InvalidConfiguration: It is one.
    """
    kind = type(unless)
    plain_list = issubclass(kind, (list, tuple, set, frozenset))
    if plain_list and not issubclass(kind, Condition) and len(unless or ()) > 1:
        raise InvalidConfiguration(
            'a plain list of several triggers reads as "either" but means "all of them"; '
            'write any_of(...) or all_of(...)',
            task=task,
            directive='unless',
        )
