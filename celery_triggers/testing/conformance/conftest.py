"""The media that the suite runs over: those of ``--triggers-storage`` or of the hook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery_triggers.testing.media import Medium

pytest.register_assert_rewrite(
    'celery_triggers.testing.conformance.support', 'celery_triggers.testing.conformance.racers'
)

#: The fixtures that are each medium in turn, and whether only shared media are among them.
_FIXTURES = {'medium': False, 'shared_medium': True}


def media_of(config: pytest.Config) -> list[Medium]:
    """Return the media to test.

    Raises:
        pytest.UsageError: Nobody named any.
    """
    urls: list[str] = config.getoption('triggers_storage')
    if urls:
        return [_at(url) for url in urls]
    found = [medium for some in config.hook.pytest_triggers_media() for medium in some]
    if not found:
        raise pytest.UsageError(
            'no storage to test: give --triggers-storage URL, or write the hook '
            'pytest_triggers_media in a conftest.py'
        )
    return found


def _at(url: str) -> Medium:
    from celery_triggers.registry import storage_backends
    from celery_triggers.settings import Settings
    from celery_triggers.testing.media import Medium

    values: dict[str, Any] = {'triggers_storage': url, 'task_always_eager': True}
    key, place = Settings(values.get).storage_location()
    if key not in storage_backends:
        raise pytest.UsageError(
            f'--triggers-storage {url}: there is no storage {key!r}, only '
            f'{", ".join(storage_backends.known())}; one of your own must be known by an entry '
            'point in the group celery_triggers.storages'
        )
    return Medium(key, place, shared=key != 'memory')


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in _FIXTURES.keys() & set(metafunc.fixturenames):
        media: list[Any] = media_of(metafunc.config)
        why = 'no medium is shared by processes'
        if _FIXTURES[name]:
            media = [medium for medium in media if medium.shared]
        if media and metafunc.definition.get_closest_marker('big_race'):
            media = [medium for medium in media if medium.big_race]
            why = 'no medium asks for the big race'
        ids = [medium.name for medium in media] or [why]
        media = media or [pytest.param(None, marks=pytest.mark.skip(why))]
        metafunc.parametrize(name, media, indirect=True, ids=ids)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'big_race: eight processes, 4,000 firings; takes a while')
    config.addinivalue_line('markers', 'timeout: of pytest-timeout, for those who have it')
    for url in config.getoption('triggers_storage', []):
        # One error, and not one for each test.
        _at(url)


@pytest.fixture
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each storage in turn, empty."""
    yield from _opened(request.param, tmp_path)


@pytest.fixture
def shared_medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each storage that several processes can share, empty."""
    yield from _opened(request.param, tmp_path)


def _opened(kind: Medium, folder: Path) -> Iterator[Medium]:
    kind.prepare()
    found = kind.open(folder)
    yield found
    found.clear()
