"""Where a Redis is: one server, the master that Sentinels know, or a cluster.

The schemes are those that others use too: ``redis`` and ``rediss`` are redis-py's,
``sentinel`` is Celery's, the ones with a plus are those of limits and redis-sentinel-url.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from celery_triggers.exceptions import StorageNotConfigured
from celery_triggers.storages.base import public_url

__all__ = ['Address', 'Host']

#: A host's name or IP address, and its port.
Host = tuple[str, int]

#: What redis-py is told unless ``triggers_storage_options`` says otherwise (seconds).
TIMEOUTS: dict[str, Any] = {'socket_timeout': 5.0, 'socket_connect_timeout': 2.0}

#: By scheme: what is there, and the scheme under which redis-py knows one of its servers.
SCHEMES = {
    'redis': ('server', 'redis'),
    'rediss': ('server', 'rediss'),
    'unix': ('server', 'unix'),
    # As Celery and kombu write it.
    'redis+socket': ('server', 'unix'),
    'sentinel': ('sentinel', 'redis'),
    'redis+sentinel': ('sentinel', 'redis'),
    'rediss+sentinel': ('sentinel', 'rediss'),
    'redis+cluster': ('cluster', 'redis'),
    'rediss+cluster': ('cluster', 'rediss'),
}

_PORTS = {'sentinel': 26379, 'cluster': 6379}

#: What only a Sentinel address has, in its query or among the options.
_OF_SENTINEL = (
    'master_name', 'min_other_sentinels', 'sentinel_kwargs', 'sentinel_password',
    'sentinel_username',
)

#: What is ours and not redis-py's.
_OPTIONS_ALONE = ('wait_replicas', 'wait_timeout')

_FILES = ('ssl_ca_certs', 'ssl_certfile', 'ssl_keyfile')


@dataclass(frozen=True)
class Address:
    """Where a Redis is, and how to talk to it.

    Attributes:
        kind: ``server``, ``sentinel`` or ``cluster``.
        public: The URL as people may see it.
        scheme: ``redis``, or ``rediss`` with TLS; of a server also ``unix``.
        rest: Of a server what follows in its URL.
        hosts: The Sentinels, or some nodes of the cluster.
        arguments: Of the connections to Redis.
        of_sentinel: What is asked of the Sentinels, and how.
        replicas: How many replicas must have confirmed an answer before it counts.
        patience: For how many milliseconds it is waited for them.
    """

    kind: str
    public: str
    scheme: str
    rest: str = ''
    hosts: tuple[Host, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of_sentinel: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 0
    patience: int = 1000

    @classmethod
    def of(cls, url: str, options: Mapping[str, Any]) -> Address:
        """Understand a URL with ``triggers_storage_options``.

        Raises:
            StorageNotConfigured: They are nothing that this package or redis-py
                understands; it says what.
        """
        try:
            _refuse_own_options(url)
            address = _parsed(url, dict(options))
            # Made without connecting, to find out now whether it understands its arguments.
            one = address.client() if address.kind != 'cluster' else address.node(address.hosts[0])
            pool = one.connection_pool
            pool.connection_class(**pool.connection_kwargs)
            _check_files(pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError) as exc:
            named = f', triggers_storage_options {sorted(options)}' if options else ''
            raise StorageNotConfigured(
                f'the storage at {public_url(url)!r}{named}: {exc}'
            ) from exc
        return address

    @property
    def _all_arguments(self) -> dict[str, Any]:
        # redis-py's own retries are off: the storage repeats what is safe.
        retry = Retry(NoBackoff(), 0)
        return {**TIMEOUTS, **self.arguments, 'decode_responses': True, 'retry': retry}

    def client(self) -> redis.Redis:
        """Return a new client of the server, or of the master, wherever that will be."""
        if self.kind == 'sentinel':
            return self._client_of_master()
        return redis.Redis.from_url(f'{self.scheme}://{self.rest}', **self._all_arguments)

    def node(self, host: Host) -> redis.Redis:
        """Return a new client of one host."""
        return redis.Redis.from_url(f'{self.scheme}://{_written(host)}', **self._all_arguments)

    def _client_of_master(self) -> redis.Redis:
        arguments = self._all_arguments
        if self.scheme == 'rediss':
            arguments['ssl'] = True
        # Of Redis and its Sentinels alike, but for who logs in. As with Celery, the options
        # that ask for TLS ask Redis alone for it; the scheme asks both.
        same = ('socket_', 'retry', *(['ssl'] if self.of_sentinel['tls'] else []))
        own = {name: value for name, value in arguments.items() if name.startswith(same)}
        for name in ('username', 'password'):
            if f'sentinel_{name}' in self.of_sentinel:
                own[name] = self.of_sentinel[f'sentinel_{name}']
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            self.hosts,
            min_other_sentinels=int(self.of_sentinel.get('min_other_sentinels', 0)),
            sentinel_kwargs={**own, **self.of_sentinel.get('sentinel_kwargs', {})},
            **arguments,
        )
        client: redis.Redis = sentinel.master_for(self.of_sentinel['master_name'])
        return client


def _parsed(url: str, options: dict[str, Any]) -> Address:
    scheme, colon, rest = url.partition('://')
    if not colon or scheme not in SCHEMES:
        known = ', '.join(f'{name}://' for name in SCHEMES)
        raise ValueError(f'a Redis is at a URL that begins with one of {known}')
    kind, of_node = SCHEMES[scheme]
    if options.pop('ssl', False) and of_node == 'redis':
        of_node = 'rediss'
    confirmed: Any = {
        'replicas': int(options.pop('wait_replicas', 0)),
        'patience': int(options.pop('wait_timeout', 1.0) * 1000),
    }
    # Celery writes CERT_REQUIRED in its URLs where redis-py understands `required`.
    rest = re.sub(r'(?<=ssl_cert_reqs=)CERT_\w+', lambda match: _requirement(match[0]), rest)
    if isinstance(options.get('ssl_cert_reqs'), str):
        options['ssl_cert_reqs'] = _requirement(options['ssl_cert_reqs'])
    if kind == 'server':
        rest = _of_server(rest, of_node, options)
        return Address(kind, public_url(url), of_node, rest, (), options, **confirmed)
    user, hosts, path, query = _parts(rest)
    asked: dict[str, Any] = parse_url(f'redis://{user}@-/?{query}')  # type: ignore[no-untyped-call]
    arguments = {**options, **{name: asked[name] for name in asked if name != 'host'}}
    own: dict[str, Any] = {}
    if kind == 'sentinel':
        own = {name: arguments.pop(name) for name in _OF_SENTINEL if name in arguments}
        own['tls'] = scheme == 'rediss+sentinel'
        if path and not path[0].isdecimal():
            own['master_name'] = path.pop(0)
        if not own.get('master_name'):
            raise ValueError(
                f'it names no master that the Sentinels know: {scheme}://host:26379/mymaster, '
                'or master_name in triggers_storage_options'
            )
    if path and 'db' not in asked:
        arguments['db'] = _database(path[0])
    if kind == 'cluster' and int(arguments.pop('db', 0)):
        raise ValueError('a cluster has database 0 alone')
    public = f'{scheme}://' + ','.join(_written(_host(text, _PORTS[kind])) for text in hosts)
    return Address(
        kind, '/'.join([public, *([own['master_name']] if own else [])]), of_node, '',
        tuple(_host(text, _PORTS[kind]) for text in hosts), arguments, own, **confirmed,
    )


def _refuse_own_options(url: str) -> None:
    for name in _OPTIONS_ALONE:
        if _asks_for(name, url):
            raise ValueError(f'{name} stands in triggers_storage_options, not in a URL')


def _asks_for(name: str, url: str) -> bool:
    return re.search(rf'[?&]{name}=', url) is not None


def _of_server(rest: str, scheme: str, options: Mapping[str, Any]) -> str:
    """Return what stands behind the scheme for one server, as redis-py understands it."""
    for name in _OF_SENTINEL:
        if name in options or _asks_for(name, rest):
            raise ValueError(f'{name} is for Sentinels alone: sentinel://host:26379/mymaster')
    if scheme == 'unix':
        # Celery's name for it.
        return re.sub(r'(?<=[?&])virtual_host=', 'db=', rest)
    path = rest.partition('?')[0].rpartition('@')[2].partition('/')[2]
    if path:
        # redis-py takes 0 for whatever it does not understand.
        _database(path)
    return rest


def _parts(rest: str) -> tuple[str, list[str], list[str], str]:
    """Return user and password, the hosts, the path's segments and the query."""
    user, query = '', ''
    hosts: list[str] = []
    path: list[str] = []
    # Celery joins whole URLs with semicolons; the first says what the others leave out.
    for part in re.split(r';(?:sentinel://)?', rest.rstrip(';')):
        place, _, asked = part.partition('?')
        place, _, segments = place.partition('/')
        login, _, names = place.rpartition('@')
        user, query = user or login, query or asked
        path = path or [unquote(segment) for segment in segments.split('/') if segment]
        hosts += names.split(',')
    return user, hosts, path, query


def _host(text: str, default: int) -> Host:
    parts = urlsplit(f'//{text}')
    if not parts.hostname:
        raise ValueError(f'{text!r} is no host, such as redis-1:7000')
    return parts.hostname, parts.port or default


def _database(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f'{text!r} is no number of a database')
    return int(text)


def _written(host: Host) -> str:
    name, port = host
    return f'[{name}]:{port}' if ':' in name else f'{name}:{port}'


def _requirement(text: str) -> str:
    return text.removeprefix('CERT_').lower()


def _check_files(arguments: Mapping[str, Any]) -> None:
    for name in _FILES:
        if arguments.get(name) and not os.path.exists(arguments[name]):
            raise ValueError(f'{name}: there is no file {arguments[name]!r}')
