from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_triggers.testing.media import Medium
from tests.media import named


def _open(name: str, folder: Path) -> Iterator[Medium]:
    found = named(name).open(folder)
    yield found
    found.clear()


@pytest.fixture
def redis_medium(tmp_path: Path) -> Iterator[Medium]:
    yield from _open('redis', tmp_path)


@pytest.fixture
def sql_medium(tmp_path: Path) -> Iterator[Medium]:
    yield from _open('sql-sqlite', tmp_path)
