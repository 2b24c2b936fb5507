"""When a session is done: the rule behind ``sessionFinalized``."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.names import SESSION_FINALIZED, is_outcome_trigger
from celery_triggers.engine.session import Session
from celery_triggers.engine.task_config import TaskConfig


@dataclass(frozen=True, slots=True)
class Reckoning:
    """What of a configuration a finalization waits for.

    Attributes:
        expected: Tasks that the application's own triggers alone can release. As long as
            one of them has no instance, there is something to come. A task that needs
            another one's end comes only while that other one counts itself.
        followers: Tasks that cannot be released before ``sessionFinalized``. Their
            waiting instances wait for the finalization and must not hold it up.
    """

    expected: frozenset[str]
    followers: frozenset[str]


def reckon(configuration: Configuration) -> Reckoning:
    """Sort the trigger tasks of a configuration (cached with it)."""
    found: Reckoning = configuration.cached(Reckoning, lambda: _reckon(configuration))
    return found


def _reckon(configuration: Configuration) -> Reckoning:
    triggers = {t for task in configuration.values() for t in task.wanted}
    beyond = {t for t in triggers if t == SESSION_FINALIZED or is_outcome_trigger(t)}
    return Reckoning(
        expected=frozenset(
            name
            for name, task in configuration.items()
            if could_hold(task, triggers - beyond - set(configuration))
        ),
        followers=frozenset(configuration)
        - _releasable(configuration, triggers - {SESSION_FINALIZED}),
    )


def waits_for_the_end(configuration: Configuration, gate: TaskConfig) -> bool:
    """Tell whether a gate cannot be released before ``sessionFinalized``."""
    late = {SESSION_FINALIZED, *reckon(configuration).followers}
    return not could_hold(gate, gate.triggers - late)


def could_hold(task: TaskConfig, triggers: Container[str]) -> bool:
    """Tell whether a task can be released if these triggers come, often and as it wants."""
    return task.wanted.holds({leaf.key for leaf in task.leaves if leaf.trigger in triggers})


def _releasable(configuration: Configuration, available: set[str]) -> frozenset[str]:
    """Return the tasks that can be released when only these triggers may come.

    A task fires its own name when it has run, which may release others, and so on
    until nothing more is added; tasks that only wait for each other are never reached.
    """
    usable = available.difference(configuration)
    reached: set[str] = set()
    while True:
        new = {
            name
            for name, task in configuration.items()
            if name not in reached and could_hold(task, usable)
        }
        if not new:
            return frozenset(reached)
        reached |= new
        usable |= new & available


def is_settled(session: Session) -> bool:
    """Tell whether ``sessionFinalized`` is to be fired now."""
    head = session.head
    if head.finalized or not head.firings:
        return False
    reckoning = reckon(session.configuration)
    waiting = sum(session.counts_of(name).unstarted for name in reckoning.followers)
    if head.unresolved > waiting + head.aside:
        return False
    return all(session.counts_of(name).total for name in reckoning.expected)
