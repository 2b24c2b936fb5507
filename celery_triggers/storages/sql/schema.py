"""The tables of the SQL storage, and the numbered steps by which they came to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement

__all__ = ['LATEST', 'Tables', 'steps_after']

#: MySQL's TEXT ends at 64 KB; where names differ by case alone they differ there too.
_TEXT = sa.Text().with_variant(
    mysql.LONGTEXT(charset='utf8mb4', collation='utf8mb4_bin'), 'mysql', 'mariadb'
)
_KEY = sa.String(32)


class Tables:
    """The tables under one prefix."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.metadata = sa.MetaData()
        self.sessions = self._table(
            'sessions',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('uid', _TEXT, nullable=False),
            sa.Column('version', sa.String(16), nullable=False),
            sa.Column('incarnation', sa.String(32), nullable=False),
            sa.Column('head', _TEXT, nullable=False),
        )
        self.entries = self._table(
            'entries',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('eid', _KEY, primary_key=True),
            sa.Column('name', _TEXT, nullable=False),
            sa.Column('value', _TEXT, nullable=False),
        )
        self.instances = self._instances()
        self.waiting = self._table(
            'waiting',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('tid', _KEY, primary_key=True),
            sa.Column('iid', _KEY, primary_key=True),
            sa.Column('trigger', _TEXT, nullable=False),
        )
        self.passing = self._table(
            'passing',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('eid', _KEY, primary_key=True),
            sa.Column('value', _TEXT, nullable=False),
            sa.Column('until', sa.BigInteger, nullable=False, index=True),
        )
        self.configurations = self._table(
            'configurations',
            sa.Column('digest', _KEY, primary_key=True),
            sa.Column('text', _TEXT, nullable=False),
        )
        self.dues = self._dues()
        self.gates = self._gates()
        self.inbox = self._inbox()
        self.sweeps = self._table(
            'sweeps',
            sa.Column('id', sa.Integer, primary_key=True, autoincrement=False),
            sa.Column('taken_at', sa.BigInteger, nullable=False),
            sa.Column('restless_until', sa.BigInteger, nullable=False),
        )
        # One row: how many steps were taken, and a random name of this very place.
        self.schema = self._table(
            'schema',
            sa.Column('id', sa.Integer, primary_key=True, autoincrement=False),
            sa.Column('version', sa.Integer, nullable=False),
            sa.Column('place', _KEY, nullable=False),
        )
        self.of_session = (
            self.entries, self.instances, self.waiting, self.passing, self.dues, self.gates,
        )

    def _instances(self) -> sa.Table:
        return self._table(
            'instances',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('iid', _KEY, primary_key=True),
            sa.Column('name', _TEXT, nullable=False),
            sa.Column('rev', sa.Integer, nullable=False),
            sa.Column('status', sa.String(16), nullable=False),
            sa.Column('attempt', sa.Integer, nullable=False),
            sa.Column('token', _TEXT, nullable=False),
            sa.Column('lease', sa.BigInteger, nullable=False),
            sa.Column('sends', sa.Integer, nullable=False),
            sa.Column('eta', sa.BigInteger, nullable=False),
            sa.Column('changed', sa.BigInteger, nullable=False),
            sa.Column('claimed', sa.BigInteger, nullable=False),
            sa.Column('loss', _TEXT, nullable=False),
            sa.Column('spared', sa.Integer, nullable=False),
            sa.Column('task_id', _TEXT, nullable=False),
            sa.Column('body', _TEXT, nullable=False),
        )

    def _dues(self) -> sa.Table:
        # An instance's due date, or the session's own under the hash of no name.
        return self._table(
            'dues',
            sa.Column('sid', _KEY, primary_key=True),
            sa.Column('iid', _KEY, primary_key=True),
            sa.Column('uid', _TEXT, nullable=False),
            sa.Column('name', _TEXT, nullable=False),
            sa.Column('at', sa.BigInteger, nullable=False, index=True),
        )

    def _gates(self) -> sa.Table:
        # Gates that wait, under the hash of the task id.
        return self._table(
            'gates',
            sa.Column('gid', _KEY, primary_key=True),
            sa.Column('sid', _KEY, nullable=False, index=True),
            sa.Column('uid', _TEXT, nullable=False),
            sa.Column('name', _TEXT, nullable=False),
        )

    def _inbox(self) -> sa.Table:
        # Firings that are part of applications' transactions.
        return self._table(
            'inbox',
            sa.Column('id', _KEY, primary_key=True),
            sa.Column('sid', _KEY, nullable=False, index=True),
            sa.Column('uid', _TEXT, nullable=False),
            sa.Column('fired', sa.BigInteger, nullable=False),
            sa.Column('at', sa.BigInteger, nullable=False, index=True),
            sa.Column('body', _TEXT, nullable=False),
        )

    def _table(self, name: str, *columns: sa.Column[object]) -> sa.Table:
        return sa.Table(
            f'{self.prefix}_{name}', self.metadata, *columns,
            mysql_engine='InnoDB', mysql_charset='utf8mb4', mysql_collate='utf8mb4_bin',
            mariadb_engine='InnoDB', mariadb_charset='utf8mb4', mariadb_collate='utf8mb4_bin',
        )


def _1_sessions(tables: Tables) -> Iterator[DDLElement]:
    """Make everything that sessions are kept in."""
    yield from _made(
        tables.sessions, tables.entries, tables.instances, tables.waiting, tables.passing,
        tables.configurations, tables.dues, tables.gates, tables.sweeps,
    )


def _2_inbox(tables: Tables) -> Iterator[DDLElement]:
    """Make room for firings within transactions, and give the place a name."""
    yield from _made(tables.inbox, tables.schema)


#: Each leads from the version before it to its own. One that was released never changes:
#: where a table changes later, the step that made it goes on making the old one. Steps only
#: add, so that processes of the version before can go on beside it.
_STEPS: Sequence[Callable[[Tables], Iterator[DDLElement]]] = (_1_sessions, _2_inbox)

#: The version that the code beside this needs.
LATEST = len(_STEPS)


def steps_after(version: int, tables: Tables) -> Iterator[tuple[int, list[DDLElement]]]:
    """Yield what leads from a version to the latest: ``(version afterwards, statements)``."""
    for number, step in enumerate(_STEPS[version:], version + 1):
        yield number, list(step(tables))


def _made(*tables: sa.Table) -> Iterator[DDLElement]:
    for table in tables:
        # Where making tables is no part of a transaction, a step may be met half done.
        yield CreateTable(table, if_not_exists=True)
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            yield CreateIndex(index, if_not_exists=True)
