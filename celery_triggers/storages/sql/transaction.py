"""The statements of the SQL storage in an open transaction of SQLAlchemy's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from celery_triggers.storages.records import STATE_COLUMNS, Commit, Row
from celery_triggers.storages.relational.database import (
    Clash,
    Found,
    NamedRow,
    Transaction,
    Wanted,
    columns_of,
)
from celery_triggers.storages.sql.statements import Statements

__all__ = ['SQLTransaction']


class SQLTransaction(Transaction):
    """The statements in an open transaction of SQLAlchemy's."""

    def __init__(self, connection: sa.Connection, statements: Statements):
        self.connection = connection
        self.statements = statements

    # ---------------------------------------------------------------- reading

    def find_at_once(self, wanted: Wanted) -> Found:
        parameters: dict[str, Any] = {'sid': wanted.sid}
        parts = []
        lists = {'entries': wanted.entries, 'waiting': wanted.triggers, 'rows': wanted.instances}
        for name, keys in lists.items():
            if keys is None:
                parts.append(f'all_{name}')
            elif keys:
                parts.append(name)
                parameters[name] = keys
        if wanted.passing:
            parts.append('passing')
            parameters['eid'] = wanted.passing
        return _found(self._execute(self.statements.find(parts), parameters))

    def configuration(self, digest: str) -> str | None:
        text: str | None = self.connection.scalar(
            self.statements.configuration, {'digest': digest}
        )
        return text

    def uids(self, after: str, prefix: str, most: int) -> list[tuple[str, str]]:
        found = self._execute(self.statements.uids, {'after': after, 'most': most})
        return [(sid, uid) for sid, uid in found]

    def gates(self, gids: Sequence[str]) -> list[tuple[str, str, str]]:
        return [
            (gid, uid, name)
            for ids in self.parted(gids)
            for gid, uid, name in self._execute(self.statements.gates, {'ids': ids})
        ]

    def all_dues(self) -> list[tuple[str, str, int]]:
        return [(uid, name, at) for uid, name, at in self._execute(self.statements.all_dues, {})]

    # ------------------------------------------------------------- one session

    def insert_session(self, sid: str, uid: str, commit: Commit) -> None:
        self._insert(
            self.statements.insert_session, {'sid': sid, 'uid': uid, **columns_of(commit)}
        )

    def update_session(self, sid: str, commit: Commit) -> bool:
        parameters = {'of': sid, 'expected': commit.expected, **columns_of(commit)}
        return bool(self._execute(self.statements.update_session, parameters).rowcount)

    def delete_session(self, sid: str, version: str | None) -> bool:
        if version is None:
            return bool(self._execute(self.statements.delete_session, {'of': sid}).rowcount)
        parameters = {'of': sid, 'expected': version}
        return bool(self._execute(self.statements.delete_version, parameters).rowcount)

    def delete_rest(self, sid: str) -> None:
        for statement in self.statements.delete_rest:
            self._execute(statement, {'of': sid})

    def insert_rows(self, sid: str, rows: Sequence[NamedRow]) -> None:
        self._insert(
            self.statements.insert_rows,
            [{'sid': sid, 'iid': iid, 'name': n, **row._asdict()} for iid, n, row in rows],
        )

    def update_rows(self, sid: str, rows: Sequence[NamedRow]) -> bool:
        parameters = [
            {'in': sid, 'of': iid, 'before': row.rev - 1, **row._asdict()}
            for iid, _, row in rows
        ]
        return bool(
            self._execute(self.statements.update_rows, parameters).rowcount == len(rows)
        )

    def put_entries(self, sid: str, entries: Sequence[tuple[str, str, str]]) -> None:
        self._execute(
            self.statements.put_entries,
            [{'sid': sid, 'eid': eid, 'name': n, 'value': value} for eid, n, value in entries],
        )

    def drop_entries(self, sid: str, eids: Sequence[str]) -> None:
        for ids in self.parted(eids):
            self._execute(self.statements.drop_entries, {'sid': sid, 'ids': ids})

    def put_waits(self, sid: str, waits: Sequence[tuple[str, str, str]]) -> None:
        self._execute(
            self.statements.put_waits,
            [{'sid': sid, 'tid': tid, 'iid': iid, 'trigger': name} for tid, iid, name in waits],
        )

    def drop_waits(self, sid: str, waits: Sequence[tuple[str, str]]) -> None:
        self._execute(
            self.statements.drop_waits,
            [{'in': sid, 'of_trigger': tid, 'of_instance': iid} for tid, iid in waits],
        )

    def put_passing(self, sid: str, eid: str, value: str, seconds: int) -> None:
        parameters = {'sid': sid, 'eid': eid, 'value': value, 'later': seconds * 1000}
        self._execute(self.statements.put_passing, parameters)

    def put_configuration(self, digest: str, text: str) -> None:
        self._execute(self.statements.put_configuration, {'digest': digest, 'text': text})

    def put_dues(self, sid: str, uid: str, dues: Sequence[tuple[str, str, int]]) -> None:
        self._execute(
            self.statements.put_dues,
            [{'sid': sid, 'iid': i, 'uid': uid, 'name': n, 'at': at} for i, n, at in dues],
        )

    def drop_dues(self, sid: str, iids: Sequence[str]) -> None:
        for ids in self.parted(iids):
            self._execute(self.statements.drop_dues, {'in': sid, 'ids': ids})

    def put_gates(self, sid: str, uid: str, gates: Sequence[tuple[str, str]]) -> None:
        self._execute(
            self.statements.put_gates,
            [{'gid': gid, 'sid': sid, 'uid': uid, 'name': name} for gid, name in gates],
        )

    def drop_gates(self, gids: Sequence[str]) -> None:
        for ids in self.parted(gids):
            self._execute(self.statements.drop_gates, {'ids': ids})

    def row_to_write(self, sid: str, iid: str, incarnation: str) -> tuple[int, Row] | None:
        parameters = {'in': sid, 'of': iid, 'incarnation': incarnation}
        found = self._execute(self.statements.row_to_write, parameters).one_or_none()
        return None if found is None else (found[0], Row(*found[1:]))

    def has_row(self, sid: str, iid: str) -> bool:
        return self._execute(self.statements.has_row, {'in': sid, 'of': iid}).first() is not None

    def update_row(self, sid: str, iid: str, row: Row) -> None:
        state = {name: getattr(row, name) for name in STATE_COLUMNS}
        self._execute(self.statements.update_state, {'in': sid, 'of': iid, **state})

    # ---------------------------------------------------- the place as a whole

    def next_due(self) -> tuple[int, int | None]:
        now, *dates = self._execute(self.statements.next_due, {}).one()
        return now, min((at for at in dates if at is not None), default=None)

    def last_sweep(self) -> tuple[int, int | None, int]:
        now, taken_at, restless = self._execute(self.statements.last_sweep, {}).one()
        return now, taken_at, restless or 0

    def note_sweep(self, now: int, restless: int) -> None:
        parameters = {'id': 1, 'taken_at': now, 'restless_until': restless}
        self._execute(self.statements.note_sweep, parameters)

    def drop_passing(self, now: int) -> None:
        self._execute(self.statements.drop_passing, {'now': now})

    def take_dues(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        found = self._execute(self.statements.dues_until, {'now': now, 'most': most}).all()
        if found:
            # They are there, and stay until the end; drivers send many such rows at once.
            self._execute(
                self.statements.put_dues, [{**due._mapping, 'at': to} for due in found]
            )
        return [(due.uid, due.name, due.at) for due in found]

    def take_inbox(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        found = self._execute(self.statements.inbox_until, {'now': now, 'most': most}).all()
        for ids in self.parted([id_ for id_, *_ in found]):
            self._execute(self.statements.move_inbox, {'ids': ids, 'to': to})
        return [(id_, uid, at) for id_, uid, at in found]

    # ------------------------------------------------------------------- inbox

    def put_in_inbox(self, id_: str, sid: str, uid: str, body: str) -> int:
        now: int = self._execute(self.statements.clock_alone, {}).scalar_one()
        parameters = {
            'id': id_, 'sid': sid, 'uid': uid, 'fired': now, 'at': now, 'body': body,
        }
        self._execute(self.statements.put_in_inbox, parameters)
        return now

    def in_inbox(self, id_: str) -> tuple[int, str] | None:
        found = self._execute(self.statements.in_inbox, {'id': id_}).one_or_none()
        return None if found is None else (found.fired, found.body)

    def inbox_of(self, sid: str) -> list[str]:
        return list(self._execute(self.statements.inbox_of, {'sid': sid}).scalars())

    def drop_from_inbox(self, ids: Sequence[str]) -> None:
        for some in self.parted(ids):
            self._execute(self.statements.drop_from_inbox, {'ids': some})

    # ---------------------------------------------------------------- helpers

    def _execute(self, statement: Any, parameters: Any) -> Any:
        return self.connection.execute(statement, parameters)

    def _insert(self, statement: Any, parameters: Any) -> None:
        try:
            self._execute(statement, parameters)
        except IntegrityError as exc:
            raise Clash from exc


def _found(records: Iterable[Any]) -> Found:
    """Return a slice, given its parts of all kinds: see :meth:`.Statements.find`."""
    result = Found(0)
    for kind, first, second, *row in records:
        if kind == 'c':
            result.now = Row(*row).lease
        elif kind == 's':
            result.version, result.head = first, second
        elif kind == 'e':
            result.entries.append((first, second))
        elif kind == 'w':
            result.waiting.append((first, second, Row(*row)))
        elif kind == 'r':
            result.rows.append((second, Row(*row)))
        else:
            result.passing = second
    return result
