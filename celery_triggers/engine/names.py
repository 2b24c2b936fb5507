"""The names of sessions, triggers and instances."""

from __future__ import annotations

from typing import Any

from celery_triggers.exceptions import InvalidFiring

#: How an instance can end besides success; ``<task>:<outcome>`` is fired then.
OUTCOMES = ('failed', 'revoked', 'abandoned', 'expired')

#: Fired once by the finalizing manager, when nothing that counts is unresolved.
SESSION_FINALIZED = 'sessionFinalized'


def outcome_trigger(task: str, outcome: str) -> str:
    """Return the name that is fired when an instance of ``task`` ends that way."""
    return f'{task}:{outcome}'


def is_outcome_trigger(trigger: str) -> bool:
    """Tell whether a name is reserved for outcomes."""
    _, colon, suffix = trigger.rpartition(':')
    return bool(colon) and suffix in OUTCOMES


def problem_with(name: Any) -> str | None:
    """Say why ``name`` cannot name anything, or return ``None`` where it can."""
    if not isinstance(name, str):
        return f'must be a string, not {type(name).__name__}'
    if not name:
        return 'must not be empty'
    try:
        name.encode()
    except UnicodeEncodeError:
        return 'holds a lone surrogate, which no storage can keep'
    return None


def problem_with_task_name(name: Any) -> str | None:
    """Say why ``name`` cannot be that of a trigger task or of a gate; ``None`` where it can."""
    problem = problem_with(name)
    if problem is None and is_outcome_trigger(name):
        return 'must not end like the name of an outcome (":failed", ":revoked", ...)'
    return problem


def plain(name: str) -> str:
    """Return the characters of a name alone: the value of an enum's member, not its label."""
    return str.__str__(name)


def check_uid(uid: Any) -> str:
    """Return ``uid`` if a session can have it.

    Raises:
        InvalidFiring: It is no string, empty, or not encodable as UTF-8.
    """
    problem = problem_with(uid)
    if problem:
        raise InvalidFiring(f'the uid of a session {problem}: {uid!r}', uid=uid)
    return plain(uid)


def check_trigger(uid: str, trigger: Any) -> str:
    """Return ``trigger`` if an application may fire it.

    Raises:
        InvalidFiring: It is no string, empty, or the name of an outcome.
    """
    problem = problem_with(trigger)
    if problem:
        raise InvalidFiring(f"a trigger's name {problem}: {trigger!r}", uid=uid, trigger=trigger)
    if is_outcome_trigger(trigger):
        raise InvalidFiring(
            f'{trigger!r} is fired by the outcome of a trigger task, never by hand; '
            'use update_instance_status() to end an instance that way',
            uid=uid,
            trigger=trigger,
        )
    return plain(trigger)


def delayed_name(event_id: str) -> str:
    """Return the name under which a delayed firing is due; no instance has such a one."""
    return f'{event_id}~'


def event_of_delayed(name: str) -> str | None:
    """Return the event id of a delayed firing, given the name under which it is due."""
    return name[:-1] if name.endswith('~') else None


def inbox_name(id_: str) -> str:
    """Return the name under which a stored firing is due; no instance has such a one."""
    return f'{id_}<'


def id_in_inbox(name: str) -> str | None:
    """Return the id of a stored firing, given the name under which it is due."""
    return name[:-1] if name.endswith('<') else None


def instance_name(task: str, number: int) -> str:
    """Return the name of a task's instance: ``t_ship#0``."""
    return f'{task}#{number}'


def split_instance_name(name: str) -> tuple[str, int]:
    """Return the task and the number of an instance's name.

    Raises:
        ValueError: It is not of the form ``<task>#<number>``.
    """
    task, hash_, number = name.rpartition('#')
    if not (task and hash_ and number.isascii() and number.isdecimal()):
        raise ValueError(f'{name!r} does not name an instance (like {"t_ship#0"!r})')
    return task, int(number)
