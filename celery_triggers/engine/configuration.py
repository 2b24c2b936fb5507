"""Trigger tasks and the configurations that hold them, validated on the way in."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from celery_triggers.engine.calls import parse_run, placeholders
from celery_triggers.engine.conditions import (
    ALWAYS,
    NEVER,
    AllOf,
    Condition,
    Kwarg,
    On,
)
from celery_triggers.engine.cycles import cycle_of_abandonments, cycle_of_runs
from celery_triggers.engine.forms import check_members, parse_condition
from celery_triggers.engine.names import plain, problem_with, problem_with_task_name
from celery_triggers.engine.task_config import DIRECTIVES, TaskConfig
from celery_triggers.exceptions import InvalidConfiguration

logger = logging.getLogger(__name__)

#: A deadline's limit, some three thousand years: a date further off is no date.
MOST_SECONDS = 1e11

_PYTHON_NAMES = set(DIRECTIVES.values())


def parse_task(name: Any, directives: Any, *, conditional: bool = True) -> TaskConfig:
    """Read one trigger task.

    Args:
        name: Its name, by convention beginning with ``t_``.
        directives: A mapping with JSON (``andEvery``) or Python (``and_every``) keys.
        conditional: Whether it must have a condition, without which nothing ever asks for
            an instance.

    Raises:
        InvalidConfiguration: It names the directive at fault and how to mend it.
    """
    _check_task_name(name)
    if isinstance(directives, TaskConfig):
        directives = directives.to_json()
    if not isinstance(directives, Mapping):
        raise InvalidConfiguration(
            f'directives are a mapping like {{"after": [...], "run": "..."}}, not {directives!r}',
            task=name,
        )
    known, extra = _split(name, directives)
    config = TaskConfig(
        name=plain(name),
        run=_run(name, known),
        after=_condition(name, 'after', known.get('after'), ALWAYS),
        and_every=_and_every(name, known.get('and_every')),
        unless=_condition(name, 'unless', known.get('unless'), NEVER),
        with_params=_with_params(name, known.get('with_params')),
        using=_optional_string(name, 'using', known.get('using')),
        within=_within(name, known.get('within')),
        extra=_plain_json(name, None, extra),
    )
    _check_keys(config)
    _check_placeholders(config)
    if conditional and not len(config.after) and config.and_every is None:
        raise InvalidConfiguration(
            'it can never run: give it "after" or "andEvery"', task=name, directive='after'
        )
    return config


def _check_keys(config: TaskConfig) -> None:
    """Refuse leaves that would share a key, and counts that would wait for themselves."""
    leaves: dict[str, On] = {}
    for leaf in config.leaves:
        other = leaves.setdefault(leaf.key, leaf)
        if other != leaf:
            raise InvalidConfiguration(
                f'"{other}" and "{leaf}" would both be received as {leaf.key!r}: '
                'give one of them another "as"',
                task=config.name,
                directive=_directive_of(config, leaf),
            )
    for leaf in config.counters:
        way = [leaf]
        while isinstance(way[-1].times, Kwarg):
            way.append(leaves[way[-1].times.key])
            if way[-1] in way[:-1]:
                raise InvalidConfiguration(
                    f'"{leaf}" waits for its own kwargs and could never hold: '
                    'give it an "as", so that they are those of another leaf',
                    task=config.name,
                    directive=_directive_of(config, leaf),
                )


def _directive_of(config: TaskConfig, leaf: On) -> str:
    return 'unless' if leaf in config.unless.leaves() else 'after'


def _check_task_name(name: Any) -> None:
    problem = problem_with_task_name(name)
    if problem:
        raise InvalidConfiguration(f"a trigger task's name {problem}: {name!r}", task=str(name))


def _split(name: str, directives: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in directives.items():
        if not isinstance(key, str):
            raise InvalidConfiguration(f'a directive is a string, not {key!r}', task=name)
        python_name = key if key in _PYTHON_NAMES else DIRECTIVES.get(key)
        if python_name is None:
            _refuse_misspelled(name, key)
            extra[plain(key)] = value
        elif python_name in known:
            raise InvalidConfiguration('it is given twice', task=name, directive=key)
        else:
            known[python_name] = value
    return known, extra


def _refuse_misspelled(name: str, key: str) -> None:
    """Refuse a directive that is kept and never looked at, where another was meant."""
    known = {json.lower(): json for json in DIRECTIVES}
    letters = ''.join(filter(str.isalpha, key)).lower()
    meant = difflib.get_close_matches(letters, known, n=1, cutoff=0.8)
    if meant:
        raise InvalidConfiguration(
            f'there is no such directive; did you mean "{known[meant[0]]}"?',
            task=name,
            directive=key,
        )


def _run(name: str, known: Mapping[str, Any]) -> str | dict[str, Any]:
    run: Any = known.get('run')
    try:
        parsed = parse_run(run)
    except InvalidConfiguration as exc:
        raise InvalidConfiguration(str(exc), task=name, directive='run') from exc
    return parsed if isinstance(parsed, str) else _plain_json(name, 'run', parsed)


def _check_placeholders(config: TaskConfig) -> None:
    """Refuse placeholders for values that an instance never receives."""
    known = {leaf.key for leaf in config.leaves}.union(config.with_params)
    for kwarg in () if isinstance(config.run, str) else placeholders(config.run):
        if kwarg.key not in known:
            raise InvalidConfiguration(
                f'an argument is to be {kwarg.name!r} of {kwarg.key!r}, which its condition '
                f'does not name; it has: {", ".join(sorted(known)) or "nothing"}',
                task=config.name,
                directive='run',
            )


def _condition(name: str, directive: str, value: Any, default: Condition) -> Condition:
    if value is None:
        return default
    try:
        condition = parse_condition(value)
        check_members(condition)
        empty = not len(condition)
    except InvalidConfiguration as exc:
        raise InvalidConfiguration(str(exc), task=name, directive=directive) from exc
    if empty:
        return default
    return AllOf((condition,)) if isinstance(condition, On) else condition


def _and_every(name: str, value: Any) -> str | None:
    if isinstance(value, On) and value == On(value.trigger):
        value = value.trigger
    if value is None:
        return None
    problem = problem_with(value)
    if problem:
        raise InvalidConfiguration(
            f'one trigger name is wanted; it {problem}: {value!r}. What else is asked of its '
            'firings stands under "after", with an "as"'
            if isinstance(value, (On, Mapping))
            else f'one trigger name is wanted; it {problem}: {value!r}',
            task=name,
            directive='andEvery',
        )
    return plain(value)


def _with_params(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise InvalidConfiguration(
            f'an object of objects is wanted, {{trigger: {{name: value}}}}, not {value!r}',
            task=name,
            directive='withParams',
        )
    return _plain_json(name, 'withParams', value)


def _optional_string(name: str, directive: str, value: Any) -> str | None:
    if value is None:
        return None
    problem = problem_with(value)
    if problem:
        raise InvalidConfiguration(
            f'a key is wanted; it {problem}: {value!r}', task=name, directive=directive
        )
    return plain(value)


def _within(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= MOST_SECONDS:
        raise InvalidConfiguration(
            f'a number of seconds is wanted, above 0 and up to {MOST_SECONDS:.0e}, not {value!r}',
            task=name,
            directive='within',
        )
    return float(value)


def _plain_json(name: str, directive: str | None, value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a copy that shares nothing with the caller's and holds JSON alone."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, default=_as_json))
    except (TypeError, ValueError) as exc:
        raise InvalidConfiguration(
            f'a configuration holds JSON alone: {exc}', task=name, directive=directive
        ) from exc
    return dict(copy)


def _as_json(value: Any) -> Any:
    """Return what stands in JSON for a placeholder, or for an iterator of a canvas."""
    if isinstance(value, Kwarg):
        return value.to_json()
    if hasattr(value, '__json__'):
        return value.__json__()
    raise TypeError(f'{type(value).__name__} is not JSON')


class Configuration(Mapping[str, TaskConfig]):
    """The trigger tasks of a session, by name; immutable and known by its content.

    Attributes:
        digest: A hash of the content; equal configurations are stored once.
    """

    def __init__(self, tasks: Mapping[str, TaskConfig]):
        self._tasks = dict(sorted(tasks.items()))
        self._plans: dict[Any, Any] = {}
        cycle = cycle_of_abandonments(self._tasks)
        if cycle:
            raise InvalidConfiguration(
                f'abandonments alone lead back to it: {" -> ".join(cycle)}; '
                'break the cycle of ":abandoned" and ":expired" triggers',
                task=cycle[0],
            )

    @classmethod
    def parse(cls, configuration: Any) -> Configuration:
        """Read ``{name: directives}``.

        Raises:
            InvalidConfiguration: It is refused whole.
        """
        if isinstance(configuration, Configuration):
            return configuration
        if not isinstance(configuration, Mapping):
            raise InvalidConfiguration(
                'a configuration maps the names of trigger tasks to their directives, '
                f'it is not {configuration!r}'
            )
        return cls({name: parse_task(name, value) for name, value in configuration.items()})

    @classmethod
    def from_text(cls, text: str) -> Configuration:
        """Read the stored form, :attr:`text`."""
        return cls.parse(json.loads(text))

    def __getitem__(self, name: str) -> TaskConfig:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f'<Configuration {self.digest[:8]}: {", ".join(self) or "empty"}>'

    @cached_property
    def text(self) -> str:
        """The canonical JSON text."""
        content = {name: task.to_json() for name, task in self.items()}
        return json.dumps(content, sort_keys=True, separators=(',', ':'))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @cached_property
    def with_deadline(self) -> list[TaskConfig]:
        """The trigger tasks that have ``within``, by name order."""
        return [task for task in self._tasks.values() if task.within is not None]

    @cached_property
    def _filters(self) -> dict[str, list[str]]:
        filters: dict[str, set[str]] = {}
        for task in self._tasks.values():
            for leaf in task.leaves:
                if leaf.where is not None:
                    filters.setdefault(leaf.trigger, set()).add(leaf.where)
        return {trigger: sorted(found) for trigger, found in filters.items()}

    def filters(self, trigger: str) -> list[str]:
        """Return the filters through which firings of a trigger are received."""
        return self._filters.get(trigger, [])

    @cached_property
    def _listeners(self) -> dict[str, list[TaskConfig]]:
        listeners: dict[str, list[TaskConfig]] = {}
        for task in self._tasks.values():
            for trigger in task.triggers:
                listeners.setdefault(trigger, []).append(task)
        return listeners

    def listeners(self, trigger: str) -> list[TaskConfig]:
        """Return the trigger tasks that a firing concerns, by name order."""
        return self._listeners.get(trigger, [])

    def cached(self, key: Any, make: Any) -> Any:
        """Return what ``make()`` returned when it was first asked for under ``key``."""
        try:
            return self._plans[key]
        except KeyError:
            value = self._plans[key] = make()
            return value

    def updated(self, changes: Mapping[str, Any]) -> Configuration:
        """Return this configuration with trigger tasks added or replaced."""
        return Configuration({**self._tasks, **Configuration.parse(changes)._tasks})

    def without(self, names: set[str]) -> Configuration:
        """Return this configuration without the trigger tasks of these names."""
        return Configuration({n: t for n, t in self._tasks.items() if n not in names})

    def warn_about_cycles(self) -> None:
        """Log a cycle through runs: legal, and endless if ``andEvery`` closes it."""
        cycle = cycle_of_runs(self._tasks)
        if cycle:
            logger.warning(
                'trigger tasks lead back to themselves: %s; make sure that this ends',
                ' -> '.join(cycle),
            )
