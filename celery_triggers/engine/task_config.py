"""A trigger task as a session has it: its condition and what to run."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from celery_triggers.engine.calls import celery_task, delay_of
from celery_triggers.engine.conditions import ALWAYS, NEVER, AllOf, Condition, On, with_counters

__all__ = ['DIRECTIVES', 'TaskConfig']

#: Directives in JSON and their names in Python.
DIRECTIVES = {
    'after': 'after',
    'andEvery': 'and_every',
    'unless': 'unless',
    'run': 'run',
    'withParams': 'with_params',
    'using': 'using',
    'within': 'within',
}


@dataclass(frozen=True)
class TaskConfig:
    """A trigger task: when to run what. Made by ``parse_task``, never by hand.

    Attributes:
        name: The trigger task's name, ``t_ship``; fired when an instance finishes.
        after: All of it must hold for an instance to be released.
        and_every: Each firing of this trigger asks for an instance of its own.
        unless: Once it holds, instances that wait are abandoned.
        run: The name of the Celery task to run, or a signature, see :mod:`.engine.calls`.
        with_params: Static kwargs, ``{trigger: {name: value}}``, merged under fired ones.
        using: The key of a task runner, or ``None`` for the manager's default.
        within: Seconds until an instance that still waits expires, or ``None``.
        extra: Directives that this package does not know, kept for custom managers.
    """

    name: str
    run: str | Mapping[str, Any]
    after: Condition = ALWAYS
    and_every: str | None = None
    unless: Condition = NEVER
    with_params: Mapping[str, Any] = field(default_factory=dict)
    using: str | None = None
    within: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    __hash__ = object.__hash__

    @cached_property
    def wanted(self) -> Condition:
        """``after`` together with ``and_every``: what a release asks for."""
        if self.every is None:
            return self.after
        return AllOf((self.after, self.every))

    @cached_property
    def celery_task(self) -> str:
        """The name of the Celery task whose message is sent."""
        return celery_task(self.run)

    @cached_property
    def delay(self) -> int:
        """In how many milliseconds after its release an instance may run."""
        return delay_of(self.run)

    @cached_property
    def every(self) -> On | None:
        """The leaf of ``and_every``."""
        return None if self.and_every is None else On(self.and_every)

    @cached_property
    def leaves(self) -> tuple[On, ...]:
        """Every leaf that can receive a firing, each once."""
        return with_counters((*self.wanted.leaves(), *self.unless.leaves()))

    @cached_property
    def counters(self) -> tuple[On, ...]:
        """The leaves that count firings."""
        return tuple(leaf for leaf in self.leaves if leaf.times is not None)

    @cached_property
    def triggers(self) -> frozenset[str]:
        """The names of all triggers that concern this task."""
        return frozenset(leaf.trigger for leaf in self.leaves)

    def leaves_on(self, trigger: str) -> list[On]:
        """Return the leaves that receive a firing of ``trigger`` as it comes."""
        return [leaf for leaf in self.leaves if leaf.trigger == trigger and leaf.times is None]

    def leaves_of(self, trigger: str) -> list[On]:
        """Return all leaves on ``trigger``, those that count included."""
        return [leaf for leaf in self.leaves if leaf.trigger == trigger]

    def triggers_beside(self, received: Container[str]) -> set[str]:
        """Return the triggers of the leaves whose keys are not in ``received``."""
        return {leaf.trigger for leaf in self.leaves if leaf.key not in received}

    def to_json(self) -> dict[str, Any]:
        """Return the directives that are set, under their JSON names."""
        values: dict[str, Any] = dict(self.extra)
        values['run'] = self.run if isinstance(self.run, str) else dict(self.run)
        if self.after != ALWAYS:
            values['after'] = self.after.to_json()
        if self.unless != NEVER:
            values['unless'] = self.unless.to_json()
        for key in ('andEvery', 'withParams', 'using', 'within'):
            value = getattr(self, DIRECTIVES[key])
            if value:
                values[key] = value
        return values
