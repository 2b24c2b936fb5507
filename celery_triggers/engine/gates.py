"""What a gate leaves in a session: an instance that brings its own condition and message."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from celery_triggers.engine.configuration import parse_task
from celery_triggers.engine.task_config import TaskConfig

__all__ = ['Gate', 'gate_config']


@dataclass(slots=True)
class Gate:
    """What is stored with the instance of a gate.

    Attributes:
        directives: Its condition, as the canonical JSON of a trigger task's directives.
        call: The message that it sends: ``{"task", "args", "kwargs", "options"}``. The
            arguments may hold placeholders.
        args, kwargs: What it was applied with, the previous result say; taken as it is.
        delay: In how many milliseconds after its release it may run.
        eta: Before when it must not run, in milliseconds of the storage's clock.
        template: Whether it is never released itself: each firing of ``andEvery`` makes a
            copy of it.
        aside: Whether a session can be final while it waits.
        since: How many firings it does not count, by leaf key: those before it was applied.
    """

    directives: str
    call: dict[str, Any]
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    delay: int = 0
    eta: int = 0
    template: bool = False
    aside: bool = False
    since: dict[str, int] = field(default_factory=dict)

    def config(self, name: str) -> TaskConfig:
        """Return it as the trigger task of this name."""
        return gate_config(name, self.directives)

    @property
    def in_chord(self) -> bool:
        """Whether it is in the header of a chord, which waits for its end."""
        return bool(self.call['options'].get('chord'))

    @property
    def has_result(self) -> bool:
        """Whether somebody may look at its result while it waits."""
        return not self.call['options'].get('ignore_result')

    def copy(self) -> Gate:
        """Return what an instance has that a template makes."""
        return Gate(
            self.directives, self.call, self.args, self.kwargs, self.delay, self.eta,
            since=dict(self.since),
        )

    def stored(self) -> dict[str, Any]:
        """Return it as a mapping, without what is empty."""
        return {name: getattr(self, name) for name in self.__slots__ if getattr(self, name)}


@lru_cache(maxsize=1000)
def gate_config(name: str, directives: str) -> TaskConfig:
    """Return the trigger task that a gate stands for.

    Raises:
        InvalidConfiguration: It names the directive at fault and how to mend it.
    """
    return parse_task(name, json.loads(directives), conditional=False)
