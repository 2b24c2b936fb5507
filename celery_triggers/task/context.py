"""What a trigger task in code receives: its context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from celery.exceptions import TaskPredicate
from celery.utils.log import get_task_logger

from celery_triggers.engine.names import check_trigger
from celery_triggers.exceptions import TriggersError, get_context, with_context
from celery_triggers.manager import Firing, TriggerManager
from celery_triggers.manager.checks import checked_kwargs
from celery_triggers.manager.firing import Run
from celery_triggers.manager.pending import ready
from celery_triggers.storages.view import TaskInstance

__all__ = ['TaskContext']


class TaskContext:
    """The context of one run of a trigger task.

    ``context['paid']`` is what the trigger ``paid`` was fired with.

    Args:
        manager: The session's trigger manager.
        instance_name: The instance that runs: ``t_ship#0``.
        trigger_kwargs: ``{trigger: kwargs}``; ``None`` reads them when they are needed.
        logger_name: The task's logger.
        run: This run; event ids are made of it.
    """

    def __init__(
        self,
        manager: TriggerManager,
        instance_name: str,
        trigger_kwargs: Mapping[str, Mapping[str, Any]] | None,
        *,
        logger_name: str = 'celery_triggers.task',
        run: Run | None = None,
    ):
        self.manager = manager
        self.instance_name = instance_name
        self.log_level = logging.NOTSET
        self._trigger_kwargs = trigger_kwargs
        self._logger_name = logger_name
        self._run = run
        self._fired: dict[str, int] = {}

    def __repr__(self) -> str:
        return f'<TaskContext of {self.instance_name} in {self.uid!r}>'

    @property
    def uid(self) -> str:
        """The session's uid."""
        return self.manager.uid

    @property
    def task_instance(self) -> TaskInstance:
        """The instance that runs, as it is stored now."""
        return self.manager.storage[self.instance_name]

    @property
    def trigger_kwargs(self) -> Mapping[str, Mapping[str, Any]]:
        """``{trigger: kwargs}``: static kwargs with the fired ones merged over them."""
        if self._trigger_kwargs is None:
            self._trigger_kwargs = self.task_instance.kwargs
        return self._trigger_kwargs

    def __getitem__(self, trigger: str) -> Mapping[str, Any]:
        """Return the kwargs of a trigger.

        Raises:
            KeyError: This instance has not received it; the error lists what it has.
        """
        try:
            return self.trigger_kwargs[trigger]
        except KeyError:
            names = ', '.join(self.trigger_kwargs) or 'nothing'
            raise KeyError(
                f'{self.instance_name} has not received {trigger!r}; it has: {names}'
            ) from None

    def __contains__(self, trigger: object) -> bool:
        return trigger in self.trigger_kwargs

    def get(self, trigger: str, default: Any = None) -> Any:
        """Return the kwargs of a trigger, or ``default``."""
        return self.trigger_kwargs.get(trigger, default)

    def fire(
        self,
        trigger_name: str,
        trigger_kwargs: Mapping[str, Any] | None = None,
        *,
        connection: Any = None,
    ) -> Firing:
        """Fire a trigger into this session.

        The event id is made of this run, the trigger, its kwargs and how often it was
        fired so: a run that is repeated after a crash does not fire again.

        Args:
            connection: As for :meth:`.TriggerManager.fire`.

        Raises:
            InvalidFiring: As by :meth:`.TriggerManager.fire`.
            ClaimLost: This run was taken for lost, and its instance is in other hands.
        """
        trigger = check_trigger(self.uid, trigger_name)
        kwargs = checked_kwargs(self.manager, trigger, trigger_kwargs)
        digest = self.manager.storage.codec.digest(trigger, kwargs)
        count = self._fired.get(digest, 0) + 1
        run = self._run
        event_id = None
        if run is not None:
            # The instance too: the replay of a gate has the same task id.
            event_id = f'{run.instance}:{run.task_id}:{run.attempt}:{digest}:{count}'
        firing = ready(
            self.manager, trigger, kwargs, event_id=event_id, connection=connection, run=run
        ).make()
        # Not before: a call that is repeated because the storage gave no answer is the same.
        self._fired[digest] = count
        return firing

    def firings(self, trigger: str) -> list[dict[str, Any]]:
        """Return the kwargs of each firing of a trigger that the history holds, in order."""
        return [
            record.kwargs for record in self.manager.storage.history if record.trigger == trigger
        ]

    def filter_kwargs(
        self, filters: Mapping[str, Mapping[str, Callable[[Any], Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Pass values through callables, such as types and validators.

        Args:
            filters: ``{trigger: {name: callable}}``; each is called with the value, or
                with ``None`` where there is none.

        Returns:
            ``{trigger: {name: filtered value}}`` for exactly these names.

        Raises:
            TriggersError: A callable raised; the error's context names the value.
        """
        return {
            trigger: {
                name: self._filtered(trigger, name, callable_)
                for name, callable_ in callables.items()
            }
            for trigger, callables in filters.items()
        }

    def _filtered(self, trigger: str, name: str, callable_: Callable[[Any], Any]) -> Any:
        value = self.trigger_kwargs.get(trigger, {}).get(name)
        try:
            return callable_(value)
        except Exception as exc:
            error = TriggersError(f'{trigger}.{name} = {value!r} is not valid: {exc}')
            raise with_context(
                error, {'trigger': trigger, 'name': name, 'value': value}
            ) from exc

    @contextmanager
    def get_logger_context(
        self, context: Mapping[str, Any] | None = None, logger: logging.Logger | None = None
    ) -> Iterator[ContextLogger]:
        """Log to the task's logger; the instance remembers the highest level.

        An exception that leaves the block is logged, with its context, and goes on;
        Celery's own ``Retry``, ``Ignore`` and ``Reject`` just go on.

        Args:
            context: Facts to add to every record, as ``extra={'context': ...}``.
            logger: The logger to use instead of the task's.
        """
        target = logger or get_task_logger(self._logger_name)
        adapter = ContextLogger(target, dict(context or {}), self)
        try:
            yield adapter
        except TaskPredicate:
            # Retry, Ignore and Reject are how a task says what is to become of it.
            raise
        except Exception as exc:
            adapter.error(
                '%s: %s', type(exc).__name__, exc, exc_info=True,
                extra={'context': get_context(exc)},
            )
            raise


class ContextLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """A logger of one run; its records carry the session, the instance and the context."""

    def __init__(self, logger: logging.Logger, facts: dict[str, Any], context: TaskContext):
        super().__init__(logger, facts)
        self._context = context

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        extra = dict(kwargs.get('extra') or {})
        facts = {**(self.extra or {}), **extra.pop('context', {})}
        kwargs['extra'] = {
            **extra,
            'context': facts,
            'uid': self._context.uid,
            'instance': self._context.instance_name,
        }
        return msg, kwargs

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        self._context.log_level = max(self._context.log_level, level)
        super().log(level, msg, *args, **kwargs)
