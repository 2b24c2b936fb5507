"""Conditions: what must have been fired before something happens.

A condition is a small tree. Its leaves (:class:`On`) receive firings and keep them
under a key; its branches (:class:`AllOf`, :class:`AnyOf`, :class:`AtLeast`) say how
many of their members must hold. Conditions are monotone: what holds goes on holding
when more is received. The engine relies on that.

How they are written is :mod:`celery_triggers.engine.forms`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from celery_triggers.exceptions import InvalidConfiguration

__all__ = ['AllOf', 'AnyOf', 'AtLeast', 'Condition', 'Kwarg', 'On']


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
        leaves = with_counters(self.leaves())
        return tuple(dict.fromkeys(leaf.trigger for leaf in leaves))

    def __contains__(self, trigger: object) -> bool:
        return trigger in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __and__(self, other: Any) -> Condition:
        return AllOf(self._beside(self, other))

    def __rand__(self, other: Any) -> Condition:
        return AllOf(self._beside(other, self))

    def __or__(self, other: Any) -> Condition:
        return AnyOf(self._beside(self, other))

    def __ror__(self, other: Any) -> Condition:
        return AnyOf(self._beside(other, self))

    def _beside(self, *members: Any) -> tuple[Condition, ...]:
        return unique(Condition.read(member) for member in members)

    @staticmethod
    def read(value: Any) -> Condition:
        """Return what stands beside a condition, as one; the forms say what else it may be."""
        if isinstance(value, Condition):
            return value
        raise InvalidConfiguration(f'a condition is wanted, not {value!r}')


def unique(members: Iterable[Condition]) -> tuple[Condition, ...]:
    """Return members, each once."""
    return tuple(dict.fromkeys(members))


@dataclass(frozen=True)
class Kwarg:
    """A value that is taken from what a leaf has received.

    Attributes:
        key: The leaf's key: a trigger's name, unless the leaf has one of its own.
        name: The name of the value in its kwargs.
    """

    key: str
    name: str

    def to_json(self) -> dict[str, list[str]]:
        return {'$kwarg': [self.key, self.name]}


@dataclass(frozen=True)
class On(Condition):
    """A leaf: holds once it has received a firing of its trigger, or several.

    Attributes:
        where: A filter; only firings that match it are received.
        named: The key under which an instance keeps what this leaf received; without it,
            the trigger's name.
        times: How many firings of its trigger the session must have seen.
    """

    trigger: str
    where: str | None = None
    named: str | None = None
    times: int | Kwarg | None = None

    @property
    def key(self) -> str:
        """The key under which an instance keeps what this leaf received."""
        return self.named or self.trigger

    def wanted_times(self, received: Mapping[str, Mapping[str, Any]]) -> int | None:
        """Return how many firings it wants; ``None`` where that is not known (yet)."""
        if not isinstance(self.times, Kwarg):
            return self.times or 1
        value = received.get(self.times.key, {}).get(self.times.name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return None
        return value

    def holds(self, received: Container[str]) -> bool:
        return self.key in received

    def leaves(self) -> Iterator[On]:
        yield self

    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        return self

    def to_json(self) -> Any:
        if (self.where, self.named, self.times) == (None, None, None):
            return self.trigger
        times = self.times.to_json() if isinstance(self.times, Kwarg) else self.times
        members = {'trigger': self.trigger, 'where': self.where, 'as': self.named, 'times': times}
        return {name: value for name, value in members.items() if value is not None}

    def __str__(self) -> str:
        """Say what it wants, for people."""
        text = self.trigger
        if self.where is not None:
            text += f' where {self.where}'
        if isinstance(self.times, Kwarg):
            return f'{text} as often as {self.times.key}.{self.times.name} says'
        return text if self.times is None else f'{text} {self.times} times'


def with_counters(leaves: Iterable[On]) -> tuple[On, ...]:
    """Return leaves, each once, and those that their ``times`` look at and that they lack."""
    found = dict.fromkeys(leaves)
    keys = {leaf.key for leaf in found}
    looked_at = [leaf.times.key for leaf in found if isinstance(leaf.times, Kwarg)]
    return (*found, *dict.fromkeys(On(key) for key in looked_at if key not in keys))


@dataclass(frozen=True, eq=False)
class OnTask(Condition):
    """A leaf that stands for the trigger of a task, until the task's name is known.

    Tasks are not looked at while modules are being imported: that would finalize the
    Celery application too early.
    """

    task: Any
    where: str | None = None
    named: str | None = None
    times: int | Kwarg | None = None

    def resolved(self, name_of: Callable[[Any], str]) -> Condition:
        return On(name_of(self.task), self.where, self.named, self.times)

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
class Branch(Condition):
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
class AllOf(Branch):
    """Holds when every member holds; without members it always holds."""

    def holds(self, received: Container[str]) -> bool:
        return all(member.holds(received) for member in self.members)

    def to_json(self) -> Any:
        return self._members_to_json()


@dataclass(frozen=True)
class AnyOf(Branch):
    """Holds when some member holds; without members it never holds."""

    def holds(self, received: Container[str]) -> bool:
        return any(member.holds(received) for member in self.members)

    def to_json(self) -> Any:
        return {'any': self._members_to_json()}


@dataclass(frozen=True)
class AtLeast(Branch):
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
