"""What the storage does within a transaction, by Django's ORM."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.db import IntegrityError, connections
from django.db.models import BigIntegerField, Exists, F, Model, QuerySet, Subquery, TextField, Value

from celery_triggers.contrib.django.clock import Clock, clock_sql
from celery_triggers.contrib.django.models import (
    START_OF_UID,
    Configuration,
    Due,
    Entry,
    Gate,
    Inbox,
    Instance,
    Passing,
    Session,
    Sweep,
    Waiting,
)
from celery_triggers.storages.records import STATE_COLUMNS, Commit, Row
from celery_triggers.storages.relational.database import (
    Clash,
    Found,
    NamedRow,
    Transaction,
    Wanted,
    columns_of,
)

__all__ = ['DjangoTransaction', 'between']

#: From how many rows on one statement writes them all.
MANY_ROWS = 3


class DjangoTransaction(Transaction):
    """The statements on the connection that a thread has under an alias.

    Args:
        prefix: The ``triggers_key_prefix`` of the sessions.
    """

    def __init__(self, alias: str, prefix: str):
        self.alias = alias
        self.prefix = prefix

    @property
    def _features(self) -> Any:
        return connections[self.alias].features

    @property
    def most_keys(self) -> int:
        limit = self._features.max_query_params
        # Triggers are named twice in a read, and what fills up columns are parameters too.
        most = super().most_keys
        return most if limit is None else max(1, min(most, (limit - 200) // 4))

    # ---------------------------------------------------------------- reading

    def find_at_once(self, wanted: Wanted) -> Found:
        parts = [part.using(self.alias) for part in _parts(wanted)]
        result, named, waits = Found(0), dict[str, tuple[str, Row]](), list[tuple[str, str]]()
        for kind, first, second, *row in parts[0].union(*parts[1:], all=True):
            if kind == 's':
                result.version, result.head, result.now = first, second, Row(*row).lease
            elif kind == 'e':
                result.entries.append((first, second))
            elif kind == 'r':
                named[first] = second, Row(*row)
            elif kind == 'w':
                waits.append((first, second))
            else:
                result.passing = second
        if result.version is None:
            result.now = self._now()
        result.rows = list(named.values())
        result.waiting = [(trigger, *named[iid]) for trigger, iid in waits if iid in named]
        return result

    def _now(self) -> int:
        connection = connections[self.alias]
        clock, parameters = clock_sql(connection)
        with connection.cursor() as cursor:
            cursor.execute(f'SELECT {clock}', parameters)
            return int(cursor.fetchone()[0])

    def configuration(self, digest: str) -> str | None:
        texts = self._here(Configuration).filter(digest=digest).values_list('text', flat=True)
        found: str | None = texts.first()
        return found

    def uids(self, after: str, prefix: str, most: int) -> list[tuple[str, str]]:
        found = self._here(Session).filter(sid__gt=after, **between(prefix, self.alias))
        return list(found.order_by('sid').values_list('sid', 'uid')[:most])

    def gates(self, gids: Sequence[str]) -> list[tuple[str, str, str]]:
        return [
            gate
            for some in self.parted(gids)
            for gate in self._here(Gate).filter(gid__in=some).values_list('gid', 'uid', 'name')
        ]

    def all_dues(self) -> list[tuple[str, str, int]]:
        return list(self._here(Due).values_list('uid', 'name', 'at'))

    # ------------------------------------------------------------- one session

    def insert_session(self, sid: str, uid: str, commit: Commit) -> None:
        session = Session(
            sid=sid, prefix=self.prefix, start=uid[:START_OF_UID], uid=uid, **columns_of(commit)
        )
        self._insert([session])

    def update_session(self, sid: str, commit: Commit) -> bool:
        found = self._of(Session, sid).filter(version=commit.expected)
        return bool(found.update(**columns_of(commit)))

    def delete_session(self, sid: str, version: str | None) -> bool:
        found = self._of(Session, sid)
        if version is not None:
            found = found.filter(version=version)
        return bool(found.delete()[0])

    def delete_rest(self, sid: str) -> None:
        for model in (Entry, Instance, Waiting, Passing, Due, Gate):
            self._of(model, sid).delete()

    def insert_rows(self, sid: str, rows: Sequence[NamedRow]) -> None:
        self._insert(_instances(sid, rows))

    def update_rows(self, sid: str, rows: Sequence[NamedRow]) -> bool:
        instances = self._of(Instance, sid)
        if len(rows) < MANY_ROWS:
            return all(
                instances.filter(iid=iid, rev=row.rev - 1).update(**row._asdict())
                for iid, _, row in rows
            )
        before = {iid: row.rev - 1 for iid, _, row in rows}
        for some in self.parted(list(before)):
            found = instances.filter(iid__in=some).select_for_update().values_list('iid', 'rev')
            if dict(found) != {iid: before[iid] for iid in some}:
                return False
        self._upsert(_instances(sid, rows), ['sid', 'iid'], list(Row._fields))
        return True

    def put_entries(self, sid: str, entries: Sequence[tuple[str, str, str]]) -> None:
        self._upsert(
            [Entry(sid=sid, eid=eid, name=n, value=value) for eid, n, value in entries],
            ['sid', 'eid'], ['value'],
        )

    def drop_entries(self, sid: str, eids: Sequence[str]) -> None:
        for some in self.parted(eids):
            self._of(Entry, sid).filter(eid__in=some).delete()

    def put_waits(self, sid: str, waits: Sequence[tuple[str, str, str]]) -> None:
        self._upsert(
            [Waiting(sid=sid, tid=tid, iid=iid, trigger=name) for tid, iid, name in waits]
        )

    def drop_waits(self, sid: str, waits: Sequence[tuple[str, str]]) -> None:
        # Mostly all triggers of one instance, or one trigger of many: a statement each.
        of_instance: dict[str, set[str]] = {}
        for tid, iid in waits:
            of_instance.setdefault(iid, set()).add(tid)
        alike: dict[frozenset[str], list[str]] = {}
        for iid, tids in of_instance.items():
            alike.setdefault(frozenset(tids), []).append(iid)
        for together, iids in alike.items():
            found = self._of(Waiting, sid).filter(tid__in=sorted(together))
            for some in self.parted(iids):
                found.filter(iid__in=some).delete()

    def put_passing(self, sid: str, eid: str, value: str, seconds: int) -> None:
        until = Clock() + Value(seconds * 1000)
        self._upsert(
            [Passing(sid=sid, eid=eid, value=value, until=until)],
            ['sid', 'eid'], ['value', 'until'],
        )

    def put_configuration(self, digest: str, text: str) -> None:
        self._upsert([Configuration(prefix=self.prefix, digest=digest, text=text)])

    def put_dues(self, sid: str, uid: str, dues: Sequence[tuple[str, str, int]]) -> None:
        self._upsert(
            [
                Due(prefix=self.prefix, sid=sid, iid=iid, uid=uid, name=name, at=at)
                for iid, name, at in dues
            ],
            ['sid', 'iid'], ['at'],
        )

    def drop_dues(self, sid: str, iids: Sequence[str]) -> None:
        for some in self.parted(iids):
            self._of(Due, sid).filter(iid__in=some).delete()

    def put_gates(self, sid: str, uid: str, gates: Sequence[tuple[str, str]]) -> None:
        self._upsert(
            [
                Gate(prefix=self.prefix, gid=gid, sid=sid, uid=uid, name=name)
                for gid, name in gates
            ],
            ['prefix', 'gid'], ['sid', 'uid', 'name'],
        )

    def drop_gates(self, gids: Sequence[str]) -> None:
        for some in self.parted(gids):
            self._here(Gate).filter(gid__in=some).delete()

    def row_to_write(self, sid: str, iid: str, incarnation: str) -> tuple[int, Row] | None:
        # Not joined: a lock would be taken on the session too, and it is for commits.
        alive = Exists(self._of(Session, sid).filter(incarnation=incarnation))
        found = (
            self._of(Instance, sid)
            .filter(alive, iid=iid)
            .annotate(now=Clock())
            .select_for_update()
            .values('now', *Row._fields)
            .first()
        )
        return None if found is None else (found.pop('now'), Row(**found))

    def has_row(self, sid: str, iid: str) -> bool:
        return bool(self._of(Instance, sid).filter(iid=iid).exists())

    def update_row(self, sid: str, iid: str, row: Row) -> None:
        state = {name: getattr(row, name) for name in STATE_COLUMNS}
        self._of(Instance, sid).filter(iid=iid).update(**state)

    # ---------------------------------------------------- the place as a whole

    def next_due(self) -> tuple[int, int | None]:
        first = [
            Subquery(self._here(model).order_by('at').values('at')[:1]) for model in (Due, Inbox)
        ]
        found = self._here(Sweep).annotate(now=Clock(), due=first[0], stored=first[1])
        dates = found.values('now', 'due', 'stored').first()
        if dates is None:
            # The row is gone on which all that hangs: let somebody look, who will make it.
            now = self._now()
            return now, now
        known = [at for at in (dates['due'], dates['stored']) if at is not None]
        return dates['now'], min(known, default=None)

    def last_sweep(self) -> tuple[int, int | None, int]:
        found = self._here(Sweep).annotate(now=Clock())
        last = found.values('now', 'taken_at', 'restless_until').first()
        if last is None:
            return self._now(), None, 0
        return last['now'], last['taken_at'], last['restless_until']

    def note_sweep(self, now: int, restless: int) -> None:
        self._upsert(
            [Sweep(prefix=self.prefix, taken_at=now, restless_until=restless)],
            ['prefix'], ['taken_at', 'restless_until'],
        )

    def drop_passing(self, now: int) -> None:
        Passing.objects.using(self.alias).filter(until__lte=now).delete()

    def take_dues(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        return [(due.uid, due.name, due.at) for due in self._take(Due, now, most, to)]

    def take_inbox(self, now: int, most: int, to: int) -> list[tuple[str, str, int]]:
        return [(stored.id, stored.uid, stored.at) for stored in self._take(Inbox, now, most, to)]

    def _take(self, model: type[Model], now: int, most: int, to: int) -> list[Any]:
        skips = self._features.has_select_for_update_skip_locked
        # What one transaction fired has ids in its order.
        found = self._here(model).filter(at__lte=now).order_by('at', 'pk').defer(
            *(['body'] if model is Inbox else [])
        )
        taken = list(found.select_for_update(skip_locked=skips)[:most])
        for some in self.parted([one.pk for one in taken]):
            self._here(model).filter(pk__in=some).update(at=to)
        return taken

    # ------------------------------------------------------------------- inbox

    def put_in_inbox(self, id_: str, sid: str, uid: str, body: str) -> int:
        now = self._now()
        stored = Inbox(
            id=id_, prefix=self.prefix, sid=sid, uid=uid, fired=now, at=now, body=body
        )
        stored.save(using=self.alias, force_insert=True)
        return now

    def in_inbox(self, id_: str) -> tuple[int, str] | None:
        found = self._here(Inbox).filter(pk=id_).values_list('fired', 'body')
        stored: tuple[int, str] | None = found.first()
        return stored

    def inbox_of(self, sid: str) -> list[str]:
        return list(self._of(Inbox, sid).values_list('pk', flat=True))

    def drop_from_inbox(self, ids: Sequence[str]) -> None:
        for some in self.parted(ids):
            self._here(Inbox).filter(pk__in=some).delete()

    # ---------------------------------------------------------------- helpers

    def _of(self, model: type[Model], sid: str) -> QuerySet[Any]:
        return model._default_manager.using(self.alias).filter(sid=sid)

    def _here(self, model: type[Model]) -> QuerySet[Any]:
        return model._default_manager.using(self.alias).filter(prefix=self.prefix)

    def _insert(self, objects: list[Any]) -> None:
        try:
            type(objects[0])._default_manager.using(self.alias).bulk_create(objects)
        except IntegrityError as exc:
            # Whatever surrounds this is rolled back, so no savepoint is needed here.
            raise Clash from exc

    def _upsert(
        self, objects: list[Any], keys: Sequence[str] = (), changing: Sequence[str] = ()
    ) -> None:
        """Insert rows, and change those that are there.

        Args:
            keys: By which columns a row is known.
            changing: What is changed then; nothing: the row stays as it is.
        """
        manager = type(objects[0])._default_manager.using(self.alias)
        if not changing:
            manager.bulk_create(objects, ignore_conflicts=True)
            return
        # MySQL takes any unique key of the table for it.
        named = self._features.supports_update_conflicts_with_target
        manager.bulk_create(
            objects, update_conflicts=True, update_fields=changing,
            unique_fields=keys if named else None,
        )


def between(start: str, alias: str) -> dict[str, str]:
    """Return how to look for the sessions whose uids begin so, as arguments of a filter.

    An index serves it on every database. For a long beginning it finds some others too.
    """
    start = start[:START_OF_UID]
    if not start:
        return {}
    # MySQL compares as if spaces followed, which come after some characters.
    least = f'{start}\x00' if connections[alias].vendor == 'mysql' else start
    beyond = _after(start)
    return {'start__gte': least, **({'start__lt': beyond} if beyond else {})}


def _after(start: str) -> str:
    """Return what comes next after all that begins so; ``''``: nothing does."""
    start = start.rstrip(chr(sys.maxunicode))
    if not start:
        return ''
    # Between the two there are surrogates, which are no characters.
    following = ord(start[-1]) + 1
    return start[:-1] + ('\ue000' if following == 0xD800 else chr(following))


def _instances(sid: str, rows: Iterable[NamedRow]) -> list[Instance]:
    return [Instance(sid=sid, iid=iid, name=name, **row._asdict()) for iid, name, row in rows]


# ------------------------------------------------------------------- one statement


def _part(model: type[Model], kind: str, first: Any, second: Any, **row: Any) -> Any:
    """Return one part of what is read, with the same columns as the others.

    All of them are annotations, since it depends on Django's version in which order these
    and a model's fields come.
    """
    texts = ('status', 'token', 'loss', 'task_id', 'body')
    filling = {
        name: Value('', TextField()) if name in texts else Value(0, BigIntegerField())
        for name in Row._fields
    }
    columns = {'kind': Value(kind, TextField()), 'first': first, 'second': second}
    named = {f'c_{name}': column for name, column in {**columns, **filling, **row}.items()}
    return model._default_manager.order_by().annotate(**named).values_list(*named)


# Annotating costs several times what running the statement does.
_SESSION = _part(Session, 's', F('version'), F('head'), lease=Clock())
_ENTRIES = _part(Entry, 'e', F('name'), F('value'))
_ROWS = _part(Instance, 'r', F('iid'), F('name'), **{name: F(name) for name in Row._fields})
_WAITING = _part(Waiting, 'w', F('trigger'), F('iid'))
_PASSING = _part(Passing, 'p', Value('', TextField()), F('value'))


def _parts(wanted: Wanted) -> Iterator[QuerySet[Any]]:
    sid = wanted.sid
    yield _SESSION.filter(sid=sid)
    if wanted.entries is None:
        yield _ENTRIES.filter(sid=sid)
    elif wanted.entries:
        yield _ENTRIES.filter(sid=sid, eid__in=wanted.entries)
    if wanted.instances is None:
        yield _ROWS.filter(sid=sid)
    elif wanted.instances:
        yield _ROWS.filter(sid=sid, iid__in=wanted.instances)
    if wanted.triggers is None:
        yield _WAITING.filter(sid=sid)
    elif wanted.triggers:
        waiting = Waiting._default_manager.filter(sid=sid, tid__in=wanted.triggers)
        yield _WAITING.filter(sid=sid, tid__in=wanted.triggers)
        yield _ROWS.filter(sid=sid, iid__in=waiting.values('iid'))
    if wanted.passing:
        yield _PASSING.filter(sid=sid, eid=wanted.passing, until__gt=Clock())
