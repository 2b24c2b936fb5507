"""Every statement that the SQL storage runs, built once.

Building an expression takes SQLAlchemy several times as long as SQLite takes to run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from celery_triggers.storages.records import STATE_COLUMNS, Row
from celery_triggers.storages.sql.dialects import Dialect
from celery_triggers.storages.sql.schema import Tables

__all__ = ['Statements']


def _bound(name: str) -> Any:
    return sa.bindparam(name)


def _among(column: Any, name: str = 'ids') -> Any:
    """Return the condition that a column is one of the parameter ``name``."""
    return column.in_(sa.bindparam(name, expanding=True))


class Statements:
    """What is run on the tables. Parameters have the names of columns, or are said."""

    def __init__(self, tables: Tables, dialect: Dialect):
        self.tables = tables
        self.dialect = dialect
        self.clock = dialect.clock()
        self._finds: dict[tuple[str, ...], Any] = {}
        self._build_session()
        self._build_rows()
        self._build_index()
        self._build_rest()
        self._build_due()
        self._build_inbox()

    # ---------------------------------------------------------------- reading

    def find(self, parts: Sequence[str]) -> Any:
        """Return the one statement that reads a slice.

        Args:
            parts: Of ``entries``, ``waiting`` and ``rows`` those of which some are wanted, or
                with ``all_`` before them those of which all are; and ``passing``.
        """
        key = tuple(parts)
        if key not in self._finds:
            chosen = [self._parts[part] for part in ('clock', 'session', *parts)]
            self._finds[key] = sa.union_all(*chosen)
        return self._finds[key]

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """What a slice is made of, each with the same columns: kind, two texts, a row."""
        t, sid = self.tables, _bound('sid')
        sessions, entries, waiting, passing = t.sessions, t.entries, t.waiting, t.passing
        instances = t.instances
        row = [instances.c[name] for name in Row._fields]
        all_entries = _part('e', entries.c.name, entries.c.value).where(entries.c.sid == sid)
        all_rows = _part('r', sa.literal_column("''"), instances.c.name, row).where(
            instances.c.sid == sid
        )
        all_waiting = self._waiting(waiting, instances, row).where(waiting.c.sid == sid)
        nothing: Any = sa.literal_column("''")
        return {
            # The time takes the place of a number that is as large.
            'clock': _part('c', nothing, nothing, _row_of(lease=self.clock)),
            'session': _part('s', sessions.c.version, sessions.c.head).where(
                sessions.c.sid == sid
            ),
            'all_entries': all_entries,
            'entries': self._each(all_entries, entries.c.eid, 'entries'),
            'all_waiting': all_waiting,
            'waiting': self._each(all_waiting, waiting.c.tid, 'waiting'),
            'all_rows': all_rows,
            'rows': self._each(all_rows, instances.c.iid, 'rows'),
            'passing': _part('p', nothing, passing.c.value).where(
                passing.c.sid == sid, passing.c.eid == _bound('eid'),
                passing.c.until > self.clock,
            ),
        }

    def _waiting(self, waiting: Any, instances: Any, row: Sequence[Any]) -> Any:
        """Return the part of the instances that wait: of all, with their triggers."""
        here = (instances.c.sid == waiting.c.sid) & (instances.c.iid == waiting.c.iid)
        if not self.dialect.looks_up_each:
            return _part('w', waiting.c.trigger, instances.c.name, row).join_from(
                waiting, instances, here
            )
        one = _apart(sa.select(instances.c.name, *row).where(here))
        columns = [one.c[name] for name in Row._fields]
        return _part('w', waiting.c.trigger, one.c.name, columns).join_from(
            waiting, one, sa.true()
        )

    def _each(self, part: Any, column: Any, name: str) -> Any:
        """Return what of a part has a column among the parameter ``name``."""
        if not self.dialect.looks_up_each:
            return part.where(_among(column, name))
        keys: Any = sa.bindparam(name, type_=postgresql.ARRAY(sa.String))
        wanted = sa.func.unnest(keys).table_valued(column).render_derived()
        found = _apart(part.where(column == wanted.c[column.name]))
        return sa.select(*found.c).join_from(wanted, found, sa.true())

    # ---------------------------------------------------------------- writing

    def _build_session(self) -> None:
        """Make a session, move it from the version ``expected`` to the next, remove it."""
        sessions = self.tables.sessions
        here = sessions.c.sid == _bound('of')
        self.insert_session = sa.insert(sessions)
        self.update_session = (
            sa.update(sessions)
            .where(here, sessions.c.version == _bound('expected'))
            .values({name: _bound(name) for name in ('version', 'incarnation', 'head')})
        )
        self.delete_session = sa.delete(sessions).where(here)
        self.delete_version = self.delete_session.where(
            sessions.c.version == _bound('expected')
        )
        self.delete_rest = [
            sa.delete(table).where(table.c.sid == _bound('of')) for table in self.tables.of_session
        ]
        # Page by page, since nobody knows how many there are. What a prefix leaves of a page is
        # not decided here: a planner that expects it to leave little would sort all sessions
        # for every page.
        self.uids = (
            sa.select(sessions.c.sid, sessions.c.uid)
            .where(sessions.c.sid > _bound('after'))
            .order_by(sessions.c.sid)
            .limit(_bound('most'))
        )

    def _build_rows(self) -> None:
        """Write rows; an update only over the revision ``before``."""
        instances, sessions = self.tables.instances, self.tables.sessions
        here = instances.c.sid == _bound('in'), instances.c.iid == _bound('of')
        self.insert_rows = sa.insert(instances)
        self.update_rows = (
            sa.update(instances)
            .where(*here, instances.c.rev == _bound('before'))
            .values({name: _bound(name) for name in Row._fields})
        )
        # Not joined: a lock would be taken on the session too, and it is for commits.
        incarnation = sa.exists().where(
            sessions.c.sid == _bound('in'), sessions.c.incarnation == _bound('incarnation')
        )
        row = [instances.c[name] for name in Row._fields]
        self.row_to_write = self._locking(sa.select(self.clock, *row).where(*here, incarnation))
        self.has_row = sa.select(instances.c.rev).where(*here)
        self.update_state = (
            sa.update(instances)
            .where(*here)
            .values({name: _bound(name) for name in STATE_COLUMNS})
        )

    def _build_index(self) -> None:
        """Note who waits for what, for which dates, and at which gates."""
        waiting, dues, gates = self.tables.waiting, self.tables.dues, self.tables.gates
        self.put_waits = self.dialect.upsert(waiting)
        self.drop_waits = sa.delete(waiting).where(
            waiting.c.sid == _bound('in'), waiting.c.tid == _bound('of_trigger'),
            waiting.c.iid == _bound('of_instance'),
        )
        self.put_dues = self.dialect.upsert(dues, 'at')
        self.drop_dues = sa.delete(dues).where(dues.c.sid == _bound('in'), _among(dues.c.iid))
        self.gates = sa.select(gates.c.gid, gates.c.uid, gates.c.name).where(_among(gates.c.gid))
        self.put_gates = self.dialect.upsert(gates, 'sid', 'uid', 'name')
        self.drop_gates = sa.delete(gates).where(_among(gates.c.gid))

    def _build_rest(self) -> None:
        """Write entries, and what else a commit holds."""
        tables = self.tables
        entries, passing = tables.entries, tables.passing
        self.put_entries = self.dialect.upsert(entries, 'value')
        self.drop_entries = sa.delete(entries).where(
            entries.c.sid == _bound('sid'), _among(entries.c.eid)
        )
        self.put_passing = self.dialect.upsert(passing, 'value', 'until').values(
            sid=_bound('sid'), eid=_bound('eid'), value=_bound('value'),
            until=self.clock + sa.bindparam('later', type_=sa.BigInteger),
        )
        self.drop_passing = sa.delete(passing).where(passing.c.until <= _bound('now'))
        self.put_configuration = self.dialect.upsert(tables.configurations)
        self.configuration = sa.select(tables.configurations.c.text).where(
            tables.configurations.c.digest == _bound('digest')
        )

    def _build_due(self) -> None:
        """Take due dates; note that somebody looks at them."""
        dues, inbox, sweeps = self.tables.dues, self.tables.inbox, self.tables.sweeps
        self.next_due = sa.select(
            self.clock,
            sa.select(sa.func.min(dues.c.at)).scalar_subquery(),
            sa.select(sa.func.min(inbox.c.at)).scalar_subquery(),
        )
        columns = dues.c.sid, dues.c.iid, dues.c.uid, dues.c.name, dues.c.at
        self.dues_until = self._taking(sa.select(*columns), dues)
        self.all_dues = sa.select(dues.c.uid, dues.c.name, dues.c.at)
        # What one transaction fired has ids in its order.
        self.inbox_until = self._taking(
            sa.select(inbox.c.id, inbox.c.uid, inbox.c.at), inbox, inbox.c.id
        )
        self.move_inbox = sa.update(inbox).where(_among(inbox.c.id)).values(at=_bound('to'))
        one = sa.select(sa.literal_column('1').label('id')).subquery()
        self.last_sweep = sa.select(
            self.clock, sweeps.c.taken_at, sweeps.c.restless_until
        ).select_from(one.outerjoin(sweeps, sweeps.c.id == one.c.id))
        self.note_sweep = self.dialect.upsert(sweeps, 'taken_at', 'restless_until')

    def _build_inbox(self) -> None:
        """Store, find and remove firings that are part of transactions."""
        inbox = self.tables.inbox
        self.clock_alone = sa.select(self.clock)
        self.put_in_inbox = sa.insert(inbox)
        self.in_inbox = sa.select(inbox.c.fired, inbox.c.body).where(inbox.c.id == _bound('id'))
        self.inbox_of = sa.select(inbox.c.id).where(inbox.c.sid == _bound('sid'))
        self.drop_from_inbox = sa.delete(inbox).where(_among(inbox.c.id))

    def _taking(self, select: Any, table: sa.Table, *then_by: Any) -> Any:
        """Return the statement that finds what is due and what nobody else is taking."""
        found = (
            select.where(table.c.at <= _bound('now'))
            .order_by(table.c.at, *then_by)
            .limit(_bound('most'))
        )
        return self._locking(found, skip_locked=True)

    def _locking(self, select: Any, **options: Any) -> Any:
        return select.with_for_update(**options) if self.dialect.locks_rows else select


def _part(kind: str, first: Any, second: Any, row: Sequence[Any] | None = None) -> Any:
    return sa.select(
        sa.literal_column(f"'{kind}'").label('kind'), first.label('first'),
        second.label('second'), *(row or _row_of()),
    )


def _row_of(**columns: Any) -> list[Any]:
    """Return the columns of a row that is none, but for those given."""
    texts = ('status', 'token', 'loss', 'task_id', 'body')
    return [
        columns.get(name, sa.literal_column("''" if name in texts else '0')).label(name)
        for name in Row._fields
    ]


def _apart(select: Any) -> Any:
    """Return what a planner looks up for each row that is joined with it, and never whole."""
    return select.offset(sa.literal_column('0')).lateral()
