"""Trigger tasks declared in code, and the workflows that they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from celery_triggers.engine.conditions import Condition
from celery_triggers.engine.configuration import Configuration, parse_task
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.forks import ForkLock
from celery_triggers.manager.managers import check_runners
from celery_triggers.storages.base import remember_configuration

__all__ = ['Declaration', 'Workflow', 'Workflows']


@dataclass(slots=True)
class Declaration:
    """What a decorator or ``configure`` said of one trigger task.

    Attributes:
        task: The Celery task, a promise of it, or its class; ``None`` where the
            directives name it.
        target: Returns the evaluated Celery task.
    """

    prefix: str
    name: str
    directives: dict[str, Any]
    task: Any = None
    target: Callable[[], Any] | None = None
    config: TaskConfig | None = field(default=None)


class Workflows:
    """All trigger tasks of an application, by the prefix of the uids that they are for.

    Task objects in conditions stand for trigger names. They are resolved when the
    configuration is first needed, since looking at a task finalizes the application.
    """

    def __init__(self) -> None:
        self._declarations: list[Declaration] = []
        self._unresolved = 0
        self._configurations: dict[tuple[str, ...], Configuration] = {}
        self._lock = ForkLock()

    def declare(self, declarations: list[Declaration]) -> None:
        """Add trigger tasks, to be resolved later."""
        with self._lock:
            self._declarations += declarations
            self._unresolved += len(declarations)

    def add(self, prefix: str, configuration: Mapping[str, Any]) -> None:
        """Add a parsed configuration; refuse it whole if it does not fit.

        Raises:
            InvalidConfiguration: A name is taken in an overlapping workflow.
        """
        parsed = Configuration.parse(configuration)
        check_runners(parsed)
        with self._lock:
            # Nothing is resolved here: a task that is looked at misses later settings.
            new = [Declaration(prefix, name, {}, config=task) for name, task in parsed.items()]
            self._check(new)
            self._declarations += new
            self._configurations.clear()
        parsed.warn_about_cycles()

    def resolve(self) -> None:
        """Read the declarations that have not been read yet.

        Raises:
            InvalidConfiguration: A declaration is wrong. It stays so, and the error comes
                each time: a session must not begin with a part of its trigger tasks.
        """
        with self._lock:
            if not self._unresolved:
                return
            pending = [d for d in self._declarations if d.config is None]
            parsed = [self._parse(declaration) for declaration in pending]
            for declaration, config in zip(pending, parsed, strict=True):
                declaration.config = config
            try:
                self._check([])
            except InvalidConfiguration:
                for declaration in pending:
                    declaration.config = None
                raise
            self._unresolved = 0
            self._configurations.clear()
        for prefix in {d.prefix for d in pending}:
            self.of_prefix(prefix).warn_about_cycles()

    def _parse(self, declaration: Declaration) -> TaskConfig:
        directives = {
            key: self._names_in(value, declaration) for key, value in declaration.directives.items()
        }
        if declaration.target is not None:
            directives['run'] = declaration.target().name
        task = parse_task(declaration.name, directives)
        check_runners({task.name: task})  # type: ignore[arg-type]
        return task

    def _names_in(self, value: Any, declaration: Declaration) -> Any:
        """Replace task objects in a condition by the names of their triggers."""
        if isinstance(value, (list, tuple, set, frozenset)):
            kind = list if isinstance(value, list) else type(value)
            return kind(self._names_in(member, declaration) for member in value)
        if isinstance(value, Condition):
            return value.resolved(lambda task: self._name_of(task, declaration))
        if type(value) in (int, float, dict, bool) or issubclass(type(value), str):
            return value
        if value is None:
            return None
        return self._name_of(value, declaration)

    def trigger_of(self, task: Any) -> str:
        """Return the name of the trigger task that a Celery task stands for.

        Raises:
            InvalidConfiguration: It stands for none, or for several.
        """
        return self._name_of(task, None)

    def _name_of(self, task: Any, declaration: Declaration | None) -> str:
        names = {d.name for d in self._declarations if d.task is task}
        if not names:
            run = getattr(task, 'name', None)
            names = {
                d.name for d in self._declarations
                if d.target is not None and run is not None and d.target().name == run
            }
        if len(names) != 1:
            what = f'stands for {sorted(names)}' if names else 'is no trigger task'
            raise InvalidConfiguration(
                f'{task!r} {what}; write the name of a trigger',
                task=declaration.name if declaration is not None else None,
            )
        return names.pop()

    def _check(self, new: list[Declaration]) -> None:
        """Refuse one trigger name for two tasks where one session could have both."""
        known: dict[str, list[Declaration]] = {}
        for declaration in (*self._declarations, *new):
            for other in known.setdefault(declaration.name, []):
                overlap = declaration.prefix.startswith(other.prefix) or other.prefix.startswith(
                    declaration.prefix
                )
                known_both = None not in (declaration.config, other.config)
                if overlap and known_both and declaration.config != other.config:
                    raise InvalidConfiguration(
                        f'it is declared twice for overlapping sessions ({other.prefix!r} and '
                        f'{declaration.prefix!r}); give one of them another trigger_name'
                        + _beside_that(declaration, other),
                        task=declaration.name,
                    )
            known[declaration.name].append(declaration)

    def of_prefix(self, prefix: str) -> Configuration:
        """Return what is declared for exactly this prefix."""
        self.resolve()
        return Configuration(
            {d.name: d.config for d in self._declarations if d.prefix == prefix and d.config}
        )

    def for_uid(self, uid: str) -> Configuration:
        """Return the union of the workflows whose prefix the uid begins with."""
        self.resolve()
        prefixes = tuple(sorted({d.prefix for d in self._declarations if uid.startswith(d.prefix)}))
        known = self._configurations.get(prefixes)
        if known is None:
            with self._lock:
                known = self._configurations[prefixes] = remember_configuration(
                    Configuration(
                        {d.name: d.config for d in self._declarations
                         if d.prefix in prefixes and d.config}
                    )
                )
        return known


def _beside_that(one: Declaration, other: Declaration) -> str:
    """Say what else must differ if two functions make one Celery task."""
    same = one.config and other.config and one.config.run == other.config.run
    if not same or one.task is other.task or None in (one.task, other.task):
        return ''
    return ', and another name= too: Celery knows both functions as one task'


class Workflow:
    """The trigger tasks of the sessions whose uid begins with a prefix."""

    def __init__(self, triggers: Any, services: Any, prefix: str):
        self._triggers = triggers
        self._services = services
        self.prefix = prefix

    def __repr__(self) -> str:
        return f'<Workflow {self.prefix!r}>'

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """Its trigger tasks by name."""
        self._services.learn_tasks()
        return dict(self._services.workflows.of_prefix(self.prefix))

    def trigger_task(self, *args: Any, **options: Any) -> Any:
        """As ``app.trigger_task``, for this workflow."""
        if 'sessions' in options:
            raise TypeError(f'the workflow {self.prefix!r} says for which sessions it is')
        return self._triggers.trigger_task(*args, sessions=self.prefix, **options)

    def configure(self, configuration: Mapping[str, Any]) -> None:
        """As ``app.triggers.configure``, for this workflow."""
        self._triggers.configure(configuration, sessions=self.prefix)

    def load(self, path: str | PathLike[str]) -> None:
        """As ``app.triggers.load``, for this workflow."""
        self._triggers.load(path, sessions=self.prefix)
