"""Every run of the tests: a Redis, the media, the table at the end."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.parts import servers

pytest_plugins = ['tests.summary']

# Here and not in a hook: the conftests of the folders below, which pytest imports before
# it calls one, ask for the server's URL.
_started: Any = None
if not servers.redis_answers():
    if servers.nothing_may_be_missing():
        raise pytest.UsageError(f'CI=true, and there is no Redis at {servers.redis_url(0)}')
    _started = servers.start_redis()


def pytest_unconfigure() -> None:
    media = sys.modules.get('tests.media')
    if media is not None:
        media.drop_tables()
    if _started is not None:
        _started.stop()


def pytest_report_header() -> str:
    wheel = ' (from a wheel)' if _started is not None else ''
    return f'redis: {servers.redis_url(0)}{wheel}  amqp: {servers.AMQP.rpartition("@")[2]}'


def pytest_triggers_media() -> list[Any]:
    from tests import media

    return media.present()
