"""What to read for a decision: worked out from the configuration, before reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.names import OUTCOMES, SESSION_FINALIZED, outcome_trigger
from celery_triggers.engine.session import Plan
from celery_triggers.engine.task_config import TaskConfig

#: Returns a plan for a session's configuration, and for whether its manager finalizes.
Planner = Callable[[Configuration, bool], Plan]


def whole(_configuration: Configuration, _finalizing: bool) -> Plan:
    """Plan for a change that looks at everything."""
    return Plan(whole=True)


def head_alone(_configuration: Configuration, _finalizing: bool) -> Plan:
    """Plan for a change of nothing but the session's head."""
    return Plan()


def firing(*triggers: str) -> Planner:
    """Plan for firing these triggers."""
    return lambda configuration, finalizing: plan_firing(
        configuration, triggers, finalizing=finalizing
    )


def firing_of(instance: str, trigger: str) -> Planner:
    """Plan for a trigger that the run of an instance fires."""
    return _with(firing(trigger), Plan(instances=frozenset({instance})))


def delayed_firing(event_id: str, trigger: str) -> Planner:
    """Plan for applying a delayed firing, or taking it back."""
    return _with(firing(trigger), Plan(delayed=frozenset({event_id})))


def _with(planner: Planner, own: Plan) -> Planner:
    return lambda configuration, finalizing: planner(configuration, finalizing) | own


def record_of(instance: str) -> Planner:
    """Plan for a change of one instance that leads to nothing else."""
    return lambda *_: Plan(instances=frozenset({instance}))


def outcome(instance: str) -> Planner:
    """Plan for the end of an instance: itself, and what its end may fire."""
    task = instance.rpartition('#')[0] or instance
    triggers = (
        task,
        *(outcome_trigger(task, end) for end in OUTCOMES),
    )

    def planner(configuration: Configuration, finalizing: bool) -> Plan:
        base = plan_firing(configuration, triggers, finalizing=finalizing)
        return base | Plan(instances=frozenset({instance}), tasks=frozenset({task}))

    return planner


def gate(name: str, triggers: Iterable[str]) -> Planner:
    """Plan for a gate that is applied under a name and waits for these triggers."""
    own = Plan(latest=frozenset(triggers), tasks=frozenset({name}))
    return _with(firing(outcome_trigger(name, 'abandoned')), own)


def plan_firing(
    configuration: Configuration, triggers: Iterable[str], *, finalizing: bool
) -> Plan:
    """Return what a decision about these firings may need, their consequences included."""
    key = (tuple(triggers), finalizing)
    if not any(configuration.listeners(trigger) for trigger in key[0]):
        # Not kept: there is no end to the names that nobody listens to.
        return _plan_firing(configuration, *key)
    plan: Plan = configuration.cached(key, lambda: _plan_firing(configuration, *key))
    return plan


def _plan_firing(
    configuration: Configuration, triggers: tuple[str, ...], finalizing: bool
) -> Plan:
    pending = [*triggers, SESSION_FINALIZED] if finalizing else list(triggers)
    fired: set[str] = set()
    heard: dict[str, TaskConfig] = {}
    while pending:
        trigger = pending.pop()
        if trigger in fired:
            continue
        fired.add(trigger)
        for task in configuration.listeners(trigger):
            heard[task.name] = task
            ends = (outcome_trigger(task.name, end) for end in ('abandoned', 'expired'))
            pending += [end for end in ends if configuration.listeners(end)]
    return Plan(
        # The first also where no trigger task listens to it: a gate may.
        waiting=frozenset(t for t in fired if configuration.listeners(t)).union(triggers[:1]),
        latest=frozenset(t for task in heard.values() for t in task.triggers).union(fired),
        tasks=frozenset(configuration if finalizing else heard),
    )
