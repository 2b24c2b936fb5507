"""Connections that are the application's: what is part of their transactions.

SQLAlchemy tells of a commit just before it is made. So what was stored is looked at when the
connection is given back or begins its next transaction, which is mostly at once; what is not
there then was rolled back, and what nobody looked at the sweep finds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy import event

from celery_triggers.exceptions import InvalidFiring
from celery_triggers.forks import ForkLock
from celery_triggers.storages.sql.database import SQLDatabase, shown

__all__ = ['check_place', 'connection_of', 'when_committed']

logger = logging.getLogger(__name__)

_KEY = 'celery_triggers'

#: Which places are known to be where the connections of an engine lead.
_places: WeakKeyDictionary[sa.Engine, set[str]] = WeakKeyDictionary()
_watched: WeakSet[sa.Engine] = WeakSet()
#: What is to be called if the open transaction of a connection is committed.
_open: WeakKeyDictionary[sa.Connection, list[Callable[[], object]]] = WeakKeyDictionary()
_lock = ForkLock()


def connection_of(given: Any, uid: str, trigger: str) -> sa.Connection:
    """Return the connection that an application gave, or that its session uses.

    Raises:
        InvalidFiring: It is neither a connection nor a session of SQLAlchemy's.
    """
    if isinstance(given, sa.Connection):
        return given
    from sqlalchemy.orm import Session, scoped_session

    if isinstance(given, (Session, scoped_session)):
        return given.connection()
    hint = ''
    if type(given).__module__.startswith('sqlalchemy.ext.asyncio'):
        hint = '; call it as: await it.run_sync(lambda sync: fire(..., connection=sync))'
    raise InvalidFiring(
        f'a firing becomes part of the transaction of a Connection or a Session of SQLAlchemy, '
        f'not of {type(given).__name__}{hint}',
        uid=uid, trigger=trigger,
    )


def check_place(
    connection: sa.Connection, database: SQLDatabase, uid: str, trigger: str
) -> None:
    """Refuse a connection that leads elsewhere than to where sessions are kept.

    Whether two URLs mean the same database nobody can tell from them, so a random name that
    the tables hold is looked at, once for each engine.

    Raises:
        InvalidFiring: It does.
        StorageUnavailable: The database of the sessions did not answer.
    """
    place = database.known_place()
    known = _places.setdefault(connection.engine, set())
    if place in known:
        return
    schema = database.tables.schema
    found = None
    if sa.inspect(connection).has_table(schema.name):
        found = connection.scalar(sa.select(schema.c.place))
    if found != place:
        raise InvalidFiring(
            f'the connection leads to {shown(connection.engine.url)}, where the sessions are not: '
            f'they are in the tables {database.prefix}_* at {database.shown}',
            uid=uid, trigger=trigger,
        )
    known.add(place)


def when_committed(connection: sa.Connection, call: Callable[[], object]) -> None:
    """Call this soon after the transaction of a connection was committed.

    It is called in the same thread, also if the commit failed after all. What it raises is
    logged.
    """
    with _lock:
        if connection not in _open:
            _open[connection] = []
            event.listen(connection, 'commit', _commit)
            event.listen(connection, 'commit_twophase', _commit)
            event.listen(connection, 'rollback', _rollback)
            event.listen(connection, 'rollback_twophase', _rollback)
            event.listen(connection, 'begin', _begin)
        if connection.engine not in _watched:
            _watched.add(connection.engine)
            event.listen(connection.engine, 'checkin', _checkin)
    _open[connection].append(call)


def _commit(connection: sa.Connection, *_: Any) -> None:
    if _open[connection]:
        # With the driver's connection, which is all that its return to the pool tells of.
        connection.info.setdefault(_KEY, []).extend(_open[connection])
        _open[connection] = []


def _rollback(connection: sa.Connection, *args: Any) -> None:
    if _open[connection] and _commits_each_statement(connection):
        _commit(connection, *args)
    _open[connection] = []


def _commits_each_statement(connection: sa.Connection) -> bool:
    """Tell whether there is nothing to roll back; the sweep finds what is not known to be so."""
    detect = getattr(connection.dialect, 'detect_autocommit_setting', None)
    if detect is None or connection.invalidated:
        return False
    return bool(detect(connection.connection.dbapi_connection))


def _begin(connection: sa.Connection) -> None:
    if not connection.invalidated:
        _call(connection.info)


def _checkin(_connection: Any, record: Any) -> None:
    _call(record.info)


def _call(info: Any) -> None:
    for call in info.pop(_KEY, ()):
        try:
            call()
        except Exception:
            # Not the application's fault, and its transaction is over: what could not be
            # applied is still in the inbox, and the sweep sees to it.
            logger.exception('a firing of a committed transaction is left to the sweep')
