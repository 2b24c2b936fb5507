"""Cycles among trigger tasks: those that could never end, and those that may."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from celery_triggers.engine.names import OUTCOMES, outcome_trigger
from celery_triggers.engine.task_config import TaskConfig


def cycle_of_abandonments(tasks: Mapping[str, TaskConfig]) -> list[str] | None:
    """Return a cycle that could go on for ever within one step, or ``None``."""
    return _find_cycle({
        name: _heard_by(tasks, name, 'abandoned', 'expired', unless=True) for name in tasks
    })


def cycle_of_runs(tasks: Mapping[str, TaskConfig]) -> list[str] | None:
    """Return a cycle of trigger tasks that wait for each other's ends, or ``None``."""
    return _find_cycle({
        name: [
            other
            for other, task in tasks.items()
            if name in task.wanted or other in _heard_by(tasks, name, 'failed', 'revoked')
        ]
        for name in tasks
    })


def loop_through(tasks: Mapping[str, TaskConfig], name: str) -> list[str] | None:
    """Return the shortest way from the ends of a trigger task back to it, or ``None``."""
    paths: dict[str, list[str]] = {name: [name]}
    pending = deque([name])
    while pending:
        task = pending.popleft()
        heard = {task, *(outcome_trigger(task, outcome) for outcome in OUTCOMES)}
        for other, config in tasks.items():
            if heard.isdisjoint(config.triggers):
                continue
            if other == name:
                return [*paths[task], name]
            if other not in paths:
                paths[other] = [*paths[task], other]
                pending.append(other)
    return None


def _heard_by(
    tasks: Mapping[str, TaskConfig], name: str, *outcomes: str, unless: bool = False
) -> list[str]:
    """Return the trigger tasks that an outcome of this one may create an instance of."""
    triggers = {outcome_trigger(name, outcome) for outcome in outcomes}
    return [
        other
        for other, task in tasks.items()
        if not triggers.isdisjoint(task.triggers if unless else task.wanted)
    ]


def _find_cycle(edges: Mapping[str, list[str]]) -> list[str] | None:
    """Return the nodes of one cycle, its first again at the end, or ``None``."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        stack: list[tuple[str, Iterator[str]]] = []
        if start not in done:
            stack.append((start, iter(edges[start])))
            path.append(start)
        while stack:
            _, successors = stack[-1]
            following = next(successors, None)
            if following is None:
                stack.pop()
                done.add(path.pop())
            elif following in path:
                return [*path[path.index(following):], following]
            elif following not in done:
                path.append(following)
                stack.append((following, iter(edges[following])))
    return None
