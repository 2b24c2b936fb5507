"""Conditions: what must have been fired before something happens.

A condition is a small tree. Its leaves (:class:`On`) receive firings and keep them
under a key; its branches (:class:`AllOf`, :class:`AnyOf`, :class:`AtLeast`) say how
many of their members must hold. Conditions are monotone: what holds goes on holding
when more is received. The engine relies on that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from celery_triggers.engine.names import plain, problem_with
from celery_triggers.exceptions import InvalidConfiguration

__all__ = [
    'AllOf',
    'AnyOf',
    'AtLeast',
    'Condition',
    'On',
    'all_of',
    'any_of',
    'at_least',
    'parse_condition',
]


class Condition(ABC):
    """What must have been received; a read-only collection of trigger names."""

    @abstractmethod
    def holds(self, received: Container[str]) -> bool:
        """Tell whether the leaves whose keys are in ``received`` suffice."""

    @abstractmethod
    def leaves(self) -> Iterator[On]:
        """Yield the leaves from left to right; a leaf may come more than once."""

    @abstractmethod
    def to_json(self) -> Any:
        """Return the JSON form, which :func:`parse_condition` reads back."""

    @abstractmethod
    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        """Return the condition with names in the place of tasks."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The triggers' names, each once, in the order of the leaves."""
        return tuple(dict.fromkeys(leaf.trigger for leaf in self.leaves()))

    def __contains__(self, trigger: object) -> bool:
        return trigger in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __and__(self, other: Any) -> Condition:
        return all_of(self, other)

    def __rand__(self, other: Any) -> Condition:
        return all_of(other, self)

    def __or__(self, other: Any) -> Condition:
        return any_of(self, other)

    def __ror__(self, other: Any) -> Condition:
        return any_of(other, self)


@dataclass(frozen=True)
class On(Condition):
    """A leaf: holds once it has received a firing of its trigger."""

    trigger: str

    @property
    def key(self) -> str:
        """The key under which an instance keeps what this leaf received."""
        return self.trigger

    def holds(self, received: Container[str]) -> bool:
        return self.key in received

    def leaves(self) -> Iterator[On]:
        yield self

    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        return self

    def to_json(self) -> Any:
        return self.trigger


@dataclass(frozen=True, eq=False)
class OnTask(Condition):
    """A leaf that stands for the trigger of a task, until the task's name is known.

    Tasks are not looked at while modules are being imported: that would finalize the
    Celery application too early.
    """

    task: Any

    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        return On(name_of(self.task))

    def _refuse(self) -> Any:
        raise InvalidConfiguration(
            'a task stands for its trigger in decorators alone; write the name of a trigger'
        )

    def holds(self, received: Container[str]) -> bool:
        return bool(self._refuse())

    def leaves(self) -> Iterator[On]:
        yield self._refuse()

    def to_json(self) -> Any:
        return self._refuse()


@dataclass(frozen=True)
class _Branch(Condition):
    members: tuple[Condition, ...]

    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        members = tuple(member.resolved(name_of) for member in self.members)
        return replace(self, members=members)

    def leaves(self) -> Iterator[On]:
        for member in self.members:
            yield from member.leaves()

    def _members_to_json(self) -> list[Any]:
        return [
            {'all': m._members_to_json()} if isinstance(m, AllOf) else m.to_json()
            for m in self.members
        ]


@dataclass(frozen=True)
class AllOf(_Branch):
    """Holds when every member holds; without members it always holds."""

    def holds(self, received: Container[str]) -> bool:
        return all(member.holds(received) for member in self.members)

    def to_json(self) -> Any:
        return self._members_to_json()


@dataclass(frozen=True)
class AnyOf(_Branch):
    """Holds when some member holds; without members it never holds."""

    def holds(self, received: Container[str]) -> bool:
        return any(member.holds(received) for member in self.members)

    def to_json(self) -> Any:
        return {'any': self._members_to_json()}


@dataclass(frozen=True)
class AtLeast(_Branch):
    """Holds when at least ``count`` members hold."""

    count: int

    def holds(self, received: Container[str]) -> bool:
        return sum(member.holds(received) for member in self.members) >= self.count

    def to_json(self) -> Any:
        return {'atLeast': self.count, 'of': self._members_to_json()}


#: The condition of a task with no ``after``: nothing is asked for.
ALWAYS = AllOf(())

#: The condition of a task with no ``unless``: nothing forbids it.
NEVER = AnyOf(())


def all_of(*members: Any) -> Condition:
    """Return a condition that holds when all members hold.

    Args:
        members: Trigger names, conditions, or tasks, which stand for their triggers.

    Raises:
        InvalidConfiguration: A member is none of these.
    """
    return AllOf(_unique(_member(member) for member in members))


def any_of(*members: Any) -> Condition:
    """Return a condition that holds when one member holds (see :func:`all_of`)."""
    return AnyOf(_unique(_member(member) for member in members))


def at_least(count: int, *members: Any) -> Condition:
    """Return a condition that holds when ``count`` of the members hold.

    Raises:
        InvalidConfiguration: ``count`` is not between 1 and the number of members, or a
            member is neither a trigger name nor a condition.
    """
    unique = _unique(_member(member) for member in members)
    _check_count(count, unique)
    return AtLeast(unique, count)


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
    problem = problem_with(value)
    if problem:
        raise InvalidConfiguration(f'a trigger name {problem}: {value!r}')
    return On(plain(value))


def parse_condition(value: Any) -> Condition:
    """Read a condition.

    Args:
        value: A :class:`Condition`; a list, tuple or set (all of its members); or a
            mapping: ``{"any": [...]}``, ``{"all": [...]}``,
            ``{"atLeast": n, "of": [...]}``, ``{"trigger": name}``. They nest.

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
        return AllOf(_unique(_member(member) for member in value))
    raise InvalidConfiguration(
        'a condition is a list of trigger names, or {"any": [...]}, {"all": [...]} or '
        f'{{"atLeast": n, "of": [...]}}, not {value!r}'
    )


def _unique(members: Iterable[Condition]) -> tuple[Condition, ...]:
    return tuple(dict.fromkeys(members))


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
        case {'trigger': str() as trigger, **rest} if not rest:
            return _member(trigger)
        case {'trigger': trigger, **rest} if not rest:
            raise InvalidConfiguration(f'"trigger" wants the name of one, not {trigger!r}')
        case {'trigger': _, **rest}:
            raise InvalidConfiguration(f'{_listed(rest)} beside "trigger" is not supported')
    raise InvalidConfiguration(
        f'{_listed(value)} is no condition; write {{"any": [...]}}, {{"all": [...]}} or '
        '{"atLeast": n, "of": [...]}'
    )


def _members(value: Any, key: str) -> tuple[Condition, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise InvalidConfiguration(f'"{key}" wants a list of at least one member, not {value!r}')
    ordered = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
    return _unique(_member(member) for member in ordered)


def check_members(condition: Condition) -> None:
    """Refuse a condition with an empty one inside it, which cannot be written down.

    Raises:
        InvalidConfiguration: It has one.
    """
    for member in condition.members if isinstance(condition, _Branch) else ():
        if isinstance(member, _Branch) and not member.members:
            raise InvalidConfiguration('a condition inside another one must not be empty')
        check_members(member)


def _listed(keys: Iterable[Any]) -> str:
    return ', '.join(repr(key) for key in keys)
