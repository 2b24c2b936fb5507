from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import MEDIA, Medium, medium


def _open(key: str, folder: Path) -> Iterator[Medium]:
    found = medium(key, folder)
    yield found
    found.clear()


@pytest.fixture(params=MEDIA, name='medium')
def _medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each storage in turn, empty."""
    yield from _open(request.param, tmp_path)


@pytest.fixture(params=['redis', 'sql'])
def shared_medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each storage that several processes can share, empty."""
    yield from _open(request.param, tmp_path)


@pytest.fixture
def redis_medium(tmp_path: Path) -> Iterator[Medium]:
    yield from _open('redis', tmp_path)


@pytest.fixture
def sql_medium(tmp_path: Path) -> Iterator[Medium]:
    yield from _open('sql', tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'big_race: eight processes, 4,000 firings; takes a while')
