from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_triggers.testing.media import Medium
from tests import django_settings, media
from tests.media import named


@pytest.fixture(autouse=True)
def _django() -> None:
    django_settings.set_up()


@pytest.fixture(params=['cache-redis', 'cache-memcached'])
def cache_medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """A cache that several processes can share, without a session."""
    if request.param in media.missing():
        pytest.skip(media.missing()[request.param])
    found = named(request.param)
    found.prepare()
    opened = found.open(tmp_path)
    yield opened
    opened.clear()


@pytest.fixture
def local_medium() -> Medium:
    """A cache in this process, without a session."""
    settings = {
        'triggers_storage': 'cache://local', 'triggers_storage_options': {'local': True},
    }
    return Medium('cache', 'cache://local', shared=False, settings=settings).open(Path())
