"""The database that the tasks write to: four tables, in SQLAlchemy Core.

Every row names the session and the task instance that wrote it. Nothing keeps an
instance from writing twice (there is no unique key), so that the check at the end would
see it. An application of your own should do the opposite: a task may run again after a
crash, so make its writes idempotent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from examples.questionnaire.places import Places
from examples.questionnaire.respondents import PAGES

__all__ = [
    'TABLES',
    'add',
    'browsers',
    'completions',
    'count_rows',
    'create_tables',
    'engine_for',
    'responses',
    'subjects',
]

_metadata = sa.MetaData()


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    return sa.Table(
        f'questionnaire_{name}',
        _metadata,
        sa.Column('id', sa.Integer, primary_key=True),
        sa.Column('uid', sa.String(40), nullable=False),
        sa.Column('instance', sa.String(60), nullable=False),
        *columns,
    )


subjects = _table('subjects', sa.Column('device', sa.String(20), nullable=False))
responses = _table(
    'responses',
    sa.Column('subject', sa.Integer, nullable=False),
    sa.Column('page', sa.Integer, nullable=False),
    sa.Column('revision', sa.Integer, nullable=False),
    *(sa.Column(answer, sa.Integer) for answers in PAGES.values() for answer in answers),
)
browsers = _table(
    'browsers',
    sa.Column('subject', sa.Integer, nullable=False),
    sa.Column('browser', sa.String(20), nullable=False),
)
completions = _table('completions')

#: The table that each trigger task writes to.
TABLES: dict[str, sa.Table] = {
    't_importSubject': subjects,
    't_importResponses': responses,
    't_importBrowserMetadata': browsers,
    't_markComplete': completions,
}


@lru_cache
def engine_for(url: str) -> sa.Engine:
    """Return this process's engine for a database."""
    engine = sa.create_engine(url)
    if engine.dialect.name == 'sqlite':
        event.listen(engine, 'connect', _share)
    return engine


def _share(connection: Any, _record: Any) -> None:
    """Let several processes write to one SQLite file without waiting for the disk."""
    connection.executescript(
        'PRAGMA busy_timeout=30000; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL'
    )


def create_tables(url: str) -> None:
    """Create the tables, empty: what an earlier run left in them goes."""
    engine = engine_for(url)
    _metadata.drop_all(engine)
    _metadata.create_all(engine)


def add(table: sa.Table, **values: object) -> int:
    """Insert one row into the run's database and return its id."""
    with engine_for(Places.from_environ().database).begin() as connection:
        inserted = connection.execute(table.insert().values(**values)).inserted_primary_key
    assert inserted is not None
    return int(inserted[0])


def count_rows(url: str) -> int:
    """Return how many rows all tables hold together."""
    counts = [sa.select(sa.func.count()).select_from(table) for table in TABLES.values()]
    with engine_for(url).connect() as connection:
        return sum(connection.execute(count).scalar_one() for count in counts)
