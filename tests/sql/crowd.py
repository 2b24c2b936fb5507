"""A hundred thousand sessions, made by the database itself."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import sqlalchemy as sa

__all__ = ['fill']

#: How a database counts from 1 to {0}, in a column n.
_SERIES = {
    'postgresql': 'SELECT n FROM generate_series(1, {0}) AS series(n)',
    'mysql': 'SELECT seq AS n FROM seq_1_to_{0}',
    'sqlite': 'WITH RECURSIVE series(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series '
              'WHERE n < {0}) SELECT n FROM series',
}

_BODY = '{"about": "as long as most bodies are", "kwargs": {"paid": {"amount": 99}}}'


def fill(engine: sa.Engine, tables: Any, size: int, prefix: str = '') -> None:
    """Make so many sessions, and let the planner know of them.

    Args:
        tables: Has the tables as attributes, under the names that ``sql`` gives them.
        prefix: What stands in the column ``prefix`` where tables are shared.
    """
    name = 'mysql' if engine.dialect.name == 'mariadb' else engine.dialect.name
    with engine.begin() as connection:
        if name == 'sqlite':
            _teach(connection)
        for table, count, each, values in _rows(tables, size):
            if name == 'postgresql':
                connection.execute(sa.text(f'ALTER TABLE "{table.name}" SET UNLOGGED'))
            connection.execute(_insert(table, _SERIES[name], count, each, values, prefix))
    analyse = {'postgresql': 'ANALYZE "{}"', 'mysql': 'ANALYZE TABLE `{}`'}.get(name)
    with engine.begin() as connection:
        for table, *_ in _rows(tables, size):
            if analyse is not None:
                connection.execute(sa.text(analyse.format(table.name)))


def _teach(connection: sa.Connection) -> None:
    """Give SQLite the functions that the others have."""
    driver: Any = connection.connection.driver_connection
    driver.create_function('md5', 1, lambda text: hashlib.md5(text.encode()).hexdigest())
    driver.create_function('concat', -1, lambda *parts: ''.join(map(str, parts)))


def _insert(
    table: sa.Table, series: str, count: int, each: int, values: Any, prefix: str
) -> sa.Insert:
    column: Any = sa.column('n', sa.Integer)
    outer = sa.text(series.format(count)).columns(column).subquery('outside')
    inner = sa.text(series.format(each)).columns(column).subquery('inside')
    found = values(outer.c.n, inner.c.n)
    if 'prefix' in table.c:
        found['prefix'] = _text(prefix)
    if 'start' in table.c:
        found['start'] = found['uid']
    select = sa.select(*(sa.type_coerce(found[name], table.c[name].type) for name in found))
    return sa.insert(table).from_select(list(found), select.join_from(outer, inner, sa.true()))


def _text(text: str) -> Any:
    return sa.literal(text, literal_execute=True)


def _rows(t: Any, size: int) -> list[tuple[sa.Table, int, int, Any]]:
    """Return for each table: how many sessions have rows, how many each, and what they hold."""
    later = sa.literal(int(time.time() * 1000) + 3_600_000, sa.BigInteger)

    def md5(kind: str, *parts: Any) -> Any:
        return sa.func.md5(sa.func.concat(_text(kind), *parts))

    def uid(n: Any) -> Any:
        return sa.func.concat(_text('crowd:'), n)

    def instance(n: Any, k: Any) -> dict[str, Any]:
        numbers = ('rev', 'attempt', 'lease', 'sends', 'eta', 'changed', 'claimed', 'spared')
        return {
            'sid': md5('s', n), 'iid': md5('t', k), 'name': _text('t_ship#0'),
            **{name: sa.literal_column('1') for name in numbers},
            'status': sa.case((k == 1, _text('unstarted')), else_=_text('finished')),
            'token': _text(''), 'loss': _text(''), 'task_id': md5('id', n), 'body': _text(_BODY),
        }

    return [
        (t.sessions, size, 1, lambda n, k: {
            'sid': md5('s', n), 'uid': uid(n), 'version': _text('0123456789abcdef'),
            'incarnation': md5('i', n), 'head': _text(_BODY),
        }),
        (t.entries, size, 2, lambda n, k: {
            'sid': md5('s', n), 'eid': md5('e', k), 'name': _text('l:paid'),
            'value': _text(_BODY),
        }),
        (t.instances, size, 2, instance),
        (t.waiting, size, 1, lambda n, k: {
            'sid': md5('s', n), 'tid': md5('w', k), 'iid': md5('t', k), 'trigger': _text('packed'),
        }),
        (t.passing, size // 2, 1, lambda n, k: {
            'sid': md5('s', n), 'eid': md5('p', n), 'value': _text(_BODY), 'until': later + n,
        }),
        (t.configurations, 1000, 1, lambda n, k: {'digest': md5('c', n), 'text': _text('{}')}),
        (t.dues, size, 1, lambda n, k: {
            'sid': md5('s', n), 'iid': md5('t', k), 'uid': uid(n), 'name': _text('t_ship#0'),
            'at': later + n,
        }),
        (t.gates, size // 5, 1, lambda n, k: {
            'gid': md5('g', n), 'sid': md5('s', n), 'uid': uid(n), 'name': _text('t_gate#0'),
        }),
        (t.inbox, size // 10, 1, lambda n, k: {
            'id': md5('f', n), 'sid': md5('s', n), 'uid': uid(n), 'fired': later,
            'at': later + n, 'body': _text('[]'),
        }),
    ]
