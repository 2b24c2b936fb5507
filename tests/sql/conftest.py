"""The databases that these tests run over, and tables of their own in them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_triggers.storages.sql.database import databases
from celery_triggers.testing.media import Medium
from tests import media
from tests.sql.places import engine_of

SQL = [medium for medium in media.present() if medium.key == 'sql']
SERVERS = [medium for medium in SQL if not str(medium.url).startswith('sqlite')]

_numbers = itertools.count()


def drop(medium: Medium) -> None:
    """Drop the tables under a prefix, and close this process's connections to them."""
    for database in databases:
        if database.prefix == medium.prefix:
            database.engine.dispose()
            database.place = ''
    engine = engine_of(medium)
    with engine.begin() as connection:
        for name in sa.inspect(connection).get_table_names():
            if name.startswith(f'{medium.prefix}_'):
                sa.Table(name, sa.MetaData()).drop(connection)
    engine.dispose()


def opened(kind: Medium, folder: Path, prefix: str = '') -> Medium:
    """Return a medium whose tables nobody has made."""
    prefix = prefix or f'sql-{os.getpid()}-{next(_numbers)}'
    return replace(kind.open(folder), prefix=prefix)


@pytest.fixture(params=SQL, ids=lambda medium: medium.name)
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each database in turn, without tables."""
    found = opened(request.param, tmp_path)
    yield found
    drop(found)


@pytest.fixture(params=SERVERS, ids=lambda medium: medium.name)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """Each database server in turn, without tables."""
    found = opened(request.param, tmp_path)
    yield found
    drop(found)


@pytest.fixture
def under() -> Iterator[Callable[[Medium, str], Medium]]:
    """Returns the medium at the same place under another prefix; its tables go."""
    found: list[Medium] = []

    def make(medium: Medium, prefix: str) -> Medium:
        found.append(replace(medium, prefix=prefix))
        return found[-1]

    yield make
    for medium in found:
        drop(medium)
