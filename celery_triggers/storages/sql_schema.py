"""The tables of the SQL storage, and every statement that it runs, built once.

Building an expression takes SQLAlchemy several times as long as SQLite takes to run it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from celery_triggers.storages.records import STATE_COLUMNS, Row

__all__ = ['Statements', 'Tables']


class Tables:
    """The tables under one prefix."""

    def __init__(self, prefix: str):
        self.metadata = sa.MetaData()
        key, text = sa.String(32), sa.Text
        self.sessions = sa.Table(
            f'{prefix}_sessions', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('uid', text, nullable=False),
            sa.Column('version', sa.String(16), nullable=False),
            sa.Column('incarnation', sa.String(32), nullable=False),
            sa.Column('head', text, nullable=False),
        )
        self.entries = sa.Table(
            f'{prefix}_entries', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('eid', key, primary_key=True),
            sa.Column('name', text, nullable=False),
            sa.Column('value', text, nullable=False),
        )
        self.instances = sa.Table(
            f'{prefix}_instances', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('iid', key, primary_key=True),
            sa.Column('name', text, nullable=False),
            sa.Column('rev', sa.Integer, nullable=False),
            sa.Column('status', sa.String(16), nullable=False),
            sa.Column('attempt', sa.Integer, nullable=False),
            sa.Column('token', sa.String(64), nullable=False),
            sa.Column('lease', sa.BigInteger, nullable=False),
            sa.Column('sends', sa.Integer, nullable=False),
            sa.Column('eta', sa.BigInteger, nullable=False),
            sa.Column('changed', sa.BigInteger, nullable=False),
            sa.Column('claimed', sa.BigInteger, nullable=False),
            sa.Column('loss', sa.String(32), nullable=False),
            sa.Column('spared', sa.Integer, nullable=False),
            sa.Column('task_id', text, nullable=False),
            sa.Column('body', text, nullable=False),
        )
        self.waiting = sa.Table(
            f'{prefix}_waiting', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('tid', key, primary_key=True),
            sa.Column('iid', key, primary_key=True),
            sa.Column('trigger', text, nullable=False),
        )
        self.passing = sa.Table(
            f'{prefix}_passing', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('eid', key, primary_key=True),
            sa.Column('value', text, nullable=False),
            sa.Column('until', sa.BigInteger, nullable=False, index=True),
        )
        self.configurations = sa.Table(
            f'{prefix}_configurations', self.metadata,
            sa.Column('digest', key, primary_key=True),
            sa.Column('text', text, nullable=False),
        )
        # An instance's due date, or the session's own under the hash of no name.
        self.dues = sa.Table(
            f'{prefix}_dues', self.metadata,
            sa.Column('sid', key, primary_key=True),
            sa.Column('iid', key, primary_key=True),
            sa.Column('uid', text, nullable=False),
            sa.Column('name', text, nullable=False),
            sa.Column('at', sa.BigInteger, nullable=False, index=True),
        )
        # Gates that wait, under the hash of the task id.
        self.gates = sa.Table(
            f'{prefix}_gates', self.metadata,
            sa.Column('gid', key, primary_key=True),
            sa.Column('sid', key, nullable=False, index=True),
            sa.Column('uid', text, nullable=False),
            sa.Column('name', text, nullable=False),
        )
        self.sweeps = sa.Table(
            f'{prefix}_sweeps', self.metadata,
            sa.Column('id', sa.Integer, primary_key=True),
            sa.Column('taken_at', sa.BigInteger, nullable=False),
            sa.Column('restless_until', sa.BigInteger, nullable=False),
        )
        self.of_session = (
            self.sessions, self.entries, self.instances, self.waiting, self.passing, self.dues,
            self.gates,
        )


def _bound(name: str) -> Any:
    return sa.bindparam(name)


def _among(column: Any) -> Any:
    """Return the condition that a column is one of the parameter ``ids``."""
    return column.in_(sa.bindparam('ids', expanding=True))


class Statements:
    """What is run on the tables. Parameters have the names of columns, or are said."""

    def __init__(self, tables: Tables):
        self._build_reads(tables)
        self._build_session(tables)
        self._build_rows(tables)
        self._build_rest(tables)
        self._build_dues(tables)

    def _build_reads(self, tables: Tables) -> None:
        """Read a part (``ids``: hashes of names) or the whole of a session."""
        sessions, entries, instances = tables.sessions, tables.entries, tables.instances
        waiting, passing = tables.waiting, tables.passing
        row = [instances.c[name] for name in Row._fields]
        self.session = sa.select(sessions.c.version, sessions.c.head).where(
            sessions.c.sid == _bound('sid')
        )
        self.all_entries = sa.select(entries.c.name, entries.c.value).where(
            entries.c.sid == _bound('sid')
        )
        self.entries = self.all_entries.where(_among(entries.c.eid))
        self.all_rows = sa.select(instances.c.name, *row).where(instances.c.sid == _bound('sid'))
        self.rows = self.all_rows.where(_among(instances.c.iid))
        self.all_waiting = (
            sa.select(waiting.c.trigger, instances.c.name, *row)
            .join(
                instances, (instances.c.sid == waiting.c.sid) & (instances.c.iid == waiting.c.iid)
            )
            .where(waiting.c.sid == _bound('sid'))
        )
        self.waiting = self.all_waiting.where(_among(waiting.c.tid))
        self.passing = sa.select(passing.c.value).where(
            passing.c.sid == _bound('sid'),
            passing.c.eid == _bound('eid'),
            passing.c.until > _bound('now'),
        )
        self.configuration = sa.select(tables.configurations.c.text).where(
            tables.configurations.c.digest == _bound('digest')
        )
        self.uids = sa.select(sessions.c.uid)

    def _build_session(self, tables: Tables) -> None:
        """Make a session, or move it from the version ``expected`` to the next."""
        sessions = tables.sessions
        self.insert_session = sa.insert(sessions)
        self.update_session = (
            sa.update(sessions)
            .where(sessions.c.sid == _bound('of'), sessions.c.version == _bound('expected'))
            .values({name: _bound(name) for name in ('version', 'incarnation', 'head')})
        )
        self.delete_session = [
            sa.delete(table).where(table.c.sid == _bound('sid')) for table in tables.of_session
        ]

    def _build_rows(self, tables: Tables) -> None:
        """Write rows; an update only over the revision ``before``."""
        instances, sessions = tables.instances, tables.sessions
        here = instances.c.sid == _bound('in'), instances.c.iid == _bound('of')
        self.insert_rows = sa.insert(instances)
        self.update_rows = (
            sa.update(instances)
            .where(*here, instances.c.rev == _bound('before'))
            .values({name: _bound(name) for name in Row._fields})
        )
        self.row_to_write = (
            sa.select(*(instances.c[name] for name in Row._fields))
            .join(sessions, sessions.c.sid == instances.c.sid)
            .where(*here, sessions.c.incarnation == _bound('incarnation'))
        )
        self.update_state = (
            sa.update(instances)
            .where(*here)
            .values({name: _bound(name) for name in STATE_COLUMNS})
        )

    def _build_rest(self, tables: Tables) -> None:
        """Write entries, the index of waiting instances, and what else a commit holds."""
        entries, waiting, passing = tables.entries, tables.waiting, tables.passing
        self.delete_entries = sa.delete(entries).where(
            entries.c.sid == _bound('sid'), _among(entries.c.eid)
        )
        self.insert_entries = sa.insert(entries)
        self.delete_waits = sa.delete(waiting).where(
            waiting.c.sid == _bound('in'),
            waiting.c.tid == _bound('of_trigger'),
            waiting.c.iid == _bound('of_instance'),
        )
        self.insert_waits = sa.insert(waiting)
        self.delete_passing = sa.delete(passing).where(passing.c.until <= _bound('now'))
        self.insert_passing = sa.insert(passing)
        self.insert_configuration = sa.insert(tables.configurations)

    def _build_dues(self, tables: Tables) -> None:
        """Set, move and take due dates; find gates."""
        dues, sweeps = tables.dues, tables.sweeps
        here = dues.c.sid == _bound('in'), dues.c.iid == _bound('of')
        self.move_due = sa.update(dues).where(*here).values(at=_bound('to'))
        self.insert_due = sa.insert(dues)
        self.delete_due = sa.delete(dues).where(*here)
        self.all_dues = sa.select(dues.c.uid, dues.c.name, dues.c.at)
        self.dues_until = (
            sa.select(dues.c.sid, dues.c.iid, dues.c.uid, dues.c.name, dues.c.at)
            .where(dues.c.at <= _bound('now'))
            .order_by(dues.c.at)
            .limit(_bound('most'))
        )
        self.next_due = sa.select(sa.func.min(dues.c.at))
        gates = tables.gates
        self.gates = sa.select(gates.c.gid, gates.c.uid, gates.c.name).where(_among(gates.c.gid))
        self.insert_gate = sa.insert(gates)
        self.delete_gates = sa.delete(gates).where(_among(gates.c.gid))
        self.last_sweep = sa.select(sweeps.c.taken_at, sweeps.c.restless_until)
        self.delete_sweep = sa.delete(sweeps)
        self.insert_sweep = sa.insert(sweeps)
