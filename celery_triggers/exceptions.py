"""Every error that this package raises on purpose.

The tree::

    TriggersError
    ├── InvalidConfiguration (ValueError)   a configuration was refused; nothing changed
    ├── InvalidFiring (ValueError)          a firing was refused; nothing changed
    │   ├── EventConflict                   its event id was used for something else
    │   ├── UnheardTrigger                  nobody listens, and triggers_unheard = 'raise'
    │   ├── ClaimLost                       the run that fires it is no longer the instance's
    │   └── CascadeLimitExceeded            a loop went round for too long
    ├── InvalidTransition (ValueError)      an instance cannot go from its status to that one
    ├── GateEnded                           the result of a gate that ended without having run
    │   ├── GateAbandoned                   its unless came, it was cancelled, or failed unsent
    │   └── GateExpired                     its deadline came first
    ├── UnknownInstance (KeyError)          the session has no instance of that name
    ├── UnknownKey (KeyError)               a registry has no class under that key
    ├── InvalidSetting (ValueError)         a setting has a value that it cannot have
    ├── MissingExtra (ImportError)          an optional dependency is not installed
    ├── StorageNotConfigured                the settings name no usable storage
    └── StorageUnavailable                  the storage did not answer; retrying is safe

Errors carry their facts as attributes, so that code need not parse messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = [
    'CascadeLimitExceeded',
    'ClaimLost',
    'EventConflict',
    'GateAbandoned',
    'GateEnded',
    'GateExpired',
    'InvalidConfiguration',
    'InvalidFiring',
    'InvalidSetting',
    'InvalidTransition',
    'MissingExtra',
    'StorageNotConfigured',
    'StorageUnavailable',
    'TriggersError',
    'UnheardTrigger',
    'UnknownInstance',
    'UnknownKey',
    'get_context',
    'with_context',
]

E = TypeVar('E', bound=BaseException)


class TriggersError(Exception):
    """The base of all errors of this package.

    Attributes:
        firings: Of an error of ``fire_many`` alone: the answers to the firings, by
            position; ``None`` for one that was not made or of which that is unknown.
    """

    firings: Sequence[Any] = ()


class InvalidConfiguration(TriggersError, ValueError):
    """A configuration was refused whole; retrying it unchanged does not help.

    Attributes:
        task: The name of the trigger task at fault, or ``None``.
        directive: The directive at fault (``after``, ``unless``, ...), or ``None``.
        file: The file in which it stands, as it was asked for, or ``None``.
        line: The line on which it begins there, from 1, or ``None`` if that is not known.
    """

    def __init__(
        self,
        message: str,
        *,
        task: str | None = None,
        directive: str | None = None,
        file: str | None = None,
        line: int | None = None,
    ):
        place = ''.join(
            f'{label} {value!r}: '
            for label, value in (('trigger task', task), ('directive', directive))
            if value is not None
        )
        super().__init__(place + message)
        self.task = task
        self.directive = directive
        self.file = file
        self.line = line

    def __str__(self) -> str:
        # File and line are mostly known to a caller only, who sets them.
        if self.file is None:
            return super().__str__()
        line = '' if self.line is None else f':{self.line}'
        return f'{self.file}{line}: {super().__str__()}'


class InvalidFiring(TriggersError, ValueError):
    """A firing was refused and changed nothing; retrying it unchanged does not help.

    Attributes:
        uid: The session that it was meant for.
        trigger: The trigger's name, as given.
    """

    def __init__(self, message: str, *, uid: Any = None, trigger: Any = None):
        super().__init__(message)
        self.uid = uid
        self.trigger = trigger


class EventConflict(InvalidFiring):
    """An event id came again with another trigger or with other kwargs.

    Attributes:
        event_id: The event id that is taken.
    """

    def __init__(self, message: str, *, uid: str, trigger: str, event_id: str):
        super().__init__(message, uid=uid, trigger=trigger)
        self.event_id = event_id


class UnheardTrigger(InvalidFiring):
    """No trigger task listens to this trigger, and ``triggers_unheard`` is ``'raise'``."""


class ClaimLost(InvalidFiring):
    """A run fires something whose instance is in other hands by now, or is gone.

    The worker was taken for lost and the instance run again, failed or replayed; or the
    session was deleted. Repeating the call does not help: the run had better end.

    Attributes:
        instance: The instance's name.
    """

    def __init__(self, message: str, *, uid: str, trigger: str, instance: str):
        super().__init__(message, uid=uid, trigger=trigger)
        self.instance = instance


class CascadeLimitExceeded(InvalidFiring):
    """Cascades led to each other more often in a row than ``triggers_max_cascade`` allows.

    Attributes:
        limit: The setting's value.
    """

    def __init__(self, message: str, *, uid: str, trigger: str, limit: int):
        super().__init__(message, uid=uid, trigger=trigger)
        self.limit = limit


class InvalidTransition(TriggersError, ValueError):
    """An instance cannot take this step from the status that it has.

    Attributes:
        instance: The instance's name.
        status: The status that it has.
        wanted: What was asked for.
    """

    def __init__(self, message: str, *, instance: str, status: str, wanted: str):
        super().__init__(message)
        self.instance = instance
        self.status = status
        self.wanted = wanted


class GateEnded(TriggersError):
    """A gate ended without having run, so its result has no value.

    ``AsyncResult.get()`` raises it. Waiting on does not help; a gate that failed can be
    replayed.

    Attributes:
        uid: The session in which it waited.
        instance: Its instance there.
        reason: Why it ended, in a few words: ``'unless: cancelled'``.
        missing: The triggers of its condition that it had not received.
    """

    def __init__(
        self,
        message: str,
        uid: str = '',
        instance: str = '',
        reason: str = '',
        missing: Sequence[str] = (),
    ):
        # A result backend keeps the arguments, and makes the exception of them again.
        super().__init__(message, uid, instance, reason, list(missing))
        self.uid = uid
        self.instance = instance
        self.reason = reason
        self.missing = list(missing)

    def __str__(self) -> str:
        return str(self.args[0])


class GateAbandoned(GateEnded):
    """What forbids the gate was fired, its session was cancelled, or it could not be sent."""


class GateExpired(GateEnded):
    """The gate's deadline came before its condition held."""


class _QuietKeyError(TriggersError, KeyError):
    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which makes prose unreadable.
        return str(self.args[0])


class UnknownInstance(_QuietKeyError):
    """The session has no instance of this name.

    Attributes:
        uid: The session.
        instance: The name that was looked for.
    """

    def __init__(self, uid: str, instance: str):
        super().__init__(f'session {uid!r} has no instance {instance!r}')
        self.uid = uid
        self.instance = instance


class UnknownKey(_QuietKeyError):
    """A registry has no class under this key.

    Attributes:
        kind: What was looked for: ``'trigger manager'``.
        key: The key that was asked for.
        known: The keys that there are, sorted.
    """

    def __init__(self, kind: str, key: object, known: Iterable[str]):
        self.kind = kind
        self.key = key
        self.known = sorted(known)
        names = ', '.join(self.known) or 'none'
        super().__init__(f'unknown {kind} {key!r}; known are: {names}')


class InvalidSetting(TriggersError, ValueError):
    """A setting has a value that it cannot have; nothing changed.

    Attributes:
        setting: The setting's name: ``triggers_unheard``.
        value: The value that it has.
    """

    def __init__(self, setting: str, value: object, wanted: str):
        super().__init__(f'the setting {setting} must be {wanted}, not {value!r}')
        self.setting = setting
        self.value = value


class MissingExtra(TriggersError, ImportError):
    """Something was asked for whose optional dependency is not installed.

    Attributes:
        extra: The extra that brings it: ``pip install 'celery_triggers[<extra>]'``; ``''`` where
            none does, and the message names a package.
    """

    def __init__(self, what: str, extra: str, package: str = ''):
        if package:
            super().__init__(f'{what} needs a package: pip install {package}')
        else:
            super().__init__(f"{what} needs an extra: pip install 'celery_triggers[{extra}]'")
        self.extra = extra


class StorageNotConfigured(TriggersError):
    """The settings name no storage that could keep sessions; set ``triggers_storage``."""


class StorageUnavailable(TriggersError):
    """The storage did not answer.

    Repeating the call with the same ``event_id`` is always safe: what was applied
    once is found again and not applied twice.

    Attributes:
        event_id: The event id of the firing, also one that was made up; ``None`` for
            other operations.
        outcome_unknown: Whether the change may have been applied all the same.
    """

    def __init__(
        self, message: str, *, event_id: str | None = None, outcome_unknown: bool = False
    ):
        super().__init__(message)
        self.event_id = event_id
        self.outcome_unknown = outcome_unknown


def with_context(exc: E, context: Mapping[str, Any]) -> E:
    """Attach facts to an exception, to be kept with the failed instance.

    Args:
        exc: Any exception.
        context: JSON-serializable facts by name; they join those attached before.

    Returns:
        The same exception, so that ``raise with_context(ValueError(...), {...})`` works.
    """
    known = getattr(exc, 'context', None)
    merged = {**known, **context} if isinstance(known, Mapping) else dict(context)
    exc.context = merged  # type: ignore[attr-defined]
    return exc


def get_context(exc: BaseException) -> dict[str, Any]:
    """Return the facts that :func:`with_context` attached, or an empty dict."""
    context = getattr(exc, 'context', None)
    return dict(context) if isinstance(context, Mapping) else {}
