"""The settings: their names, their defaults and what they mean.

They are Celery settings with the prefix ``triggers_``, read from the application's
configuration whenever they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from kombu.serialization import prepare_accept_content, registry  # type: ignore[attr-defined]

from celery_triggers.engine.limits import Limits
from celery_triggers.exceptions import InvalidSetting, StorageNotConfigured

__all__ = ['DEFAULTS', 'Settings']

#: Every setting with its default.
DEFAULTS: dict[str, Any] = {
    'triggers_storage': None,
    'triggers_storage_options': {},
    'triggers_key_prefix': 'triggers',
    'triggers_manager': 'default',
    'triggers_runner': 'celery',
    'triggers_serializer': 'json',
    'triggers_history_limit': 1000,
    'triggers_unheard': 'warn',
    'triggers_lease': 60,
    'triggers_dispatch_grace': 30,
    'triggers_redeliver_after': 3600,
    'triggers_max_deliveries': 10,
    'triggers_sweep_interval': 10,
    'triggers_session_expires': None,
    'triggers_max_cascade': 1000,
}

#: Celery's own settings that matter here, with what stands for their absence.
_OF_CELERY: dict[str, Any] = {
    'accept_content': ['json'],
    'broker_transport_options': {},
    'broker_url': None,
    'broker_use_ssl': None,
    'redis_backend_use_ssl': None,
    'result_backend': None,
    'result_backend_transport_options': {},
    'result_expires': None,
    'task_always_eager': False,
}

#: By the setting of a URL of Celery's: where the rest stands that such a Redis needs.
_REDIS_OF_CELERY = {
    'result_backend': ('result_backend_transport_options', 'redis_backend_use_ssl'),
    'broker_url': ('broker_transport_options', 'broker_use_ssl'),
}

#: What a Redis that Sentinels watch needs of a transport's options.
_OF_SENTINELS = ('master_name', 'min_other_sentinels', 'sentinel_kwargs')

#: A hundred years: what is beyond that no storage can count in milliseconds for long.
MOST_SECONDS = 100 * 365 * 86400

#: The shortest time after which the state of a waiting gate is stored again (milliseconds).
LEAST_REFRESH = 500

_URL_SCHEMES = {
    'redis': 'redis',
    'rediss': 'redis',
    'sentinel': 'redis',
    'unix': 'redis',
    'memory': 'memory',
    'sqlite': 'sql',
    'postgresql': 'sql',
    'postgres': 'sql',
    'mysql': 'sql',
    'mariadb': 'sql',
}


def _is_number(value: Any, least: float, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= least


def _is_seconds(value: Any, least: float) -> bool:
    return _is_number(value, least, (int, float)) and value <= MOST_SECONDS


class Settings:
    """The settings of one application.

    Args:
        get: Looks a Celery setting up: ``get(name, default)``.
        state: Returns something that differs when a setting was changed; without it,
            nothing is remembered.
    """

    def __init__(
        self, get: Callable[[str, Any], Any], state: Callable[[], object] | None = None
    ):
        self._get = get
        self._state = state
        self._frozen: tuple[object, Settings] | None = None
        self._location: tuple[str, str | None] | None = None
        self._limits: Limits | None = None

    def frozen(self) -> Settings:
        """Return the settings as they are now, which are then looked up at no cost.

        Looking a setting up in Celery's configuration takes some microseconds, and a
        firing asks for ten.
        """
        if self._state is None:
            return self
        state = self._state()
        if self._frozen is None or self._frozen[0] != state:
            values = {name: self._get(name, default) for name, default in DEFAULTS.items()}
            values |= {name: self._get(name, default) for name, default in _OF_CELERY.items()}
            frozen = Settings(values.get)
            frozen._location = self.storage_location_or_none()
            for name in DEFAULTS:
                short = name.removeprefix('triggers_')
                setattr(frozen, short, getattr(frozen, short))
            frozen.check()
            frozen._limits = frozen.limits
            self._frozen = (state, frozen)
        return self._frozen[1]

    def check(self) -> None:
        """Refuse values that a setting cannot have.

        Raises:
            InvalidSetting: It names the setting.
        """
        wanted: list[tuple[str, bool, str]] = [
            ('unheard', self.unheard in ('warn', 'ignore', 'raise'), "'warn', 'ignore' or 'raise'"),
            ('history_limit', _is_number(self.history_limit, 0, int), 'a whole number from 0 on'),
            ('lease', _is_seconds(self.lease, 1), 'seconds, at least 1'),
            ('dispatch_grace', _is_seconds(self.dispatch_grace, 0.1), 'seconds, from 0.1 on'),
            ('redeliver_after', _is_seconds(self.redeliver_after, 1), 'seconds, at least 1'),
            ('max_deliveries', _is_number(self.max_deliveries, 1, int), 'a whole number from 1 on'),
            ('sweep_interval', _is_seconds(self.sweep_interval, 0), 'seconds; 0: none'),
            ('session_expires', self._may_expire(), 'None or seconds, at least 1'),
            ('max_cascade', _is_number(self.max_cascade, 1, int), 'a whole number from 1 on'),
            ('key_prefix', isinstance(self.key_prefix, str), 'a string'),
            ('storage_options', isinstance(self.storage_options, Mapping), 'a dictionary'),
            ('serializer', self.serializer in registry._encoders, 'a serializer that kombu knows'),
            ('serializer', self._accepts_its_own(), "in Celery's accept_content too"),
            ('manager', isinstance(self.manager, str), 'the registry key of a trigger manager'),
            ('runner', isinstance(self.runner, str), 'the registry key of a task runner'),
        ]
        for name, holds, what in wanted:
            if not holds:
                raise InvalidSetting(f'triggers_{name}', getattr(self, name), what)

    def _may_expire(self) -> bool:
        expires = self.session_expires
        return expires is None or _is_seconds(expires, 1)

    def _accepts_its_own(self) -> bool:
        encoder = registry._encoders.get(self.serializer)
        accepted = prepare_accept_content(self.accept_content) or ()
        return encoder is not None and encoder.content_type in accepted

    def __getattr__(self, name: str) -> Any:
        """Return the setting ``triggers_<name>``, or its default."""
        full_name = f'triggers_{name}'
        if full_name not in DEFAULTS:
            raise AttributeError(f'there is no setting {full_name!r}')
        value = self._get(full_name, DEFAULTS[full_name])
        if name == 'storage_options' and isinstance(value or {}, Mapping):
            return {**self._options_of_celery(), **(value or {})}
        return DEFAULTS[full_name] if value is None else value

    @property
    def accept_content(self) -> list[str]:
        """The content types that may be read, Celery's ``accept_content``."""
        return list(self._get('accept_content', ['json']))

    @property
    def limits(self) -> Limits:
        """What a decision follows."""
        if self._limits is not None:
            return self._limits
        return Limits(
            dispatch_grace=int(self.dispatch_grace * 1000),
            max_deliveries=self.max_deliveries,
            max_cascade=self.max_cascade,
            chord_patience=int(self.lease * 1000),
            gate_refresh=self._gate_refresh(),
        )

    def _gate_refresh(self) -> int:
        """Return in how many milliseconds half of a result's life is over; 0: it has no end."""
        expires = self._get('result_expires', None)
        if not expires or not self._get('result_backend', None):
            return 0
        seconds = expires.total_seconds() if isinstance(expires, timedelta) else float(expires)
        return max(LEAST_REFRESH, int(seconds * 500))

    def storage_location(self) -> tuple[str, str | None]:
        """Return the registry key of the storage and its URL, if it has one.

        Raises:
            StorageNotConfigured: Nothing names a storage that keeps what it is given.
        """
        if self._location is not None:
            return self._location
        value = self._get('triggers_storage', None)
        if value:
            return self._located(str(value))
        for name in ('result_backend', 'broker_url'):
            url = self._get(name, None)
            found = self._derived(url) if isinstance(url, str) else None
            if found:
                return found
        raise StorageNotConfigured(
            'no storage for sessions: set triggers_storage to a URL such as '
            "'redis://localhost/0' or 'sqlite:///triggers.db' (neither the result backend "
            'nor the broker can keep sessions)'
        )

    def storage_location_or_none(self) -> tuple[str, str | None] | None:
        """As :meth:`storage_location`, with ``None`` instead of an error."""
        try:
            return self.storage_location()
        except StorageNotConfigured:
            return None

    def _located(self, value: str) -> tuple[str, str | None]:
        if '://' not in value:
            if value == 'memory':
                self._check_memory()
            return value, None
        scheme = value.removeprefix('db+').split('://', 1)[0].split('+', 1)[0]
        key = _URL_SCHEMES.get(scheme, scheme)
        if key == 'memory':
            self._check_memory()
        return key, value.removeprefix('db+')

    def _derived(self, url: str) -> tuple[str, str | None] | None:
        if url.startswith('db+'):
            return self._located(url)
        scheme = url.split('://', 1)[0]
        if '://' in url and scheme in ('redis', 'rediss', 'sentinel', 'redis+socket'):
            return 'redis', url
        if url.startswith('memory://'):
            self._check_memory()
            return 'memory', None
        return None

    def _options_of_celery(self) -> dict[str, Any]:
        """Return what Celery is told beside the URL, where the storage is Celery's Redis."""
        key, url = self.storage_location_or_none() or ('', None)
        for name, (transport, tls) in _REDIS_OF_CELERY.items():
            if key == 'redis' and url and url == self._get(name, None):
                asked = self._get(transport, None) or {}
                options = {option: asked[option] for option in _OF_SENTINELS if option in asked}
                secured = self._get(tls, None)
                if secured:
                    options |= {'ssl': True, **(secured if isinstance(secured, Mapping) else {})}
                return options
        return {}

    def _check_memory(self) -> None:
        """Refuse sessions in one process's memory where messages go to other processes."""
        broker = self._get('broker_url', None) or ''
        local = broker.startswith('memory://') or self._get('task_always_eager', False)
        if not local and self.runner == 'celery':
            raise StorageNotConfigured(
                f'triggers_storage = memory keeps sessions in this process alone, but the '
                f"broker {broker.split('@')[-1]!r} hands tasks to others, which would not find "
                'them; set triggers_storage to a URL such as redis://localhost/0'
            )
