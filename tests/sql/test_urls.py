"""URLs and options: what is refused says so, and passwords are told nobody."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_triggers.exceptions import (
    MissingExtra,
    StorageNotConfigured,
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.testing.media import Medium
from tests.parts.proxy import DatabaseProxy
from tests.sql.places import SHORT, connected, database_of

ROOT = Path(__file__).resolve().parents[2]

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}

SECRET = 'hunter2'


@pytest.fixture(autouse=True)
def nothing_is_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of this module may be logged, in any detail, by any logger."""
    with caplog.at_level(logging.DEBUG):
        yield
    assert SECRET not in caplog.text


def refused(url: str, kind: type[TriggersError] = StorageNotConfigured, **options: Any) -> str:
    """Return what is said of a storage that cannot be."""
    with pytest.raises(kind) as caught:
        Medium('sql', url).manager(EACH, triggers_storage_options=options).fire('a')
    whole = ''.join(traceback.format_exception(caught.value))
    assert SECRET not in whole
    return str(caught.value)


@pytest.mark.parametrize(
    ('url', 'usual'),
    [
        ('postgresql+nonsense://h/d', 'psycopg'),
        ('postgresql+psycopg2://h/d', 'psycopg'),
        ('postgresql+asyncpg://h/d', 'psycopg'),
        ('postgresql+psycopg_async://h/d', 'psycopg'),
        ('mysql+nonsense://h/d', 'mysqldb or pymysql'),
        ('mysql+aiomysql://h/d', 'mysqldb or pymysql'),
        ('mariadb+asyncmy://h/d', 'mysqldb or pymysql'),
        ('sqlite+aiosqlite:///x.db', 'pysqlite'),
        ('sqlite+nonsense:///x.db', 'pysqlite'),
    ],
)
def test_a_driver_that_is_unknown_or_asynchronous(url: str, usual: str):
    said = refused(url.replace('://h', f'://me:{SECRET}@h'))
    database, driver = url.partition('://')[0].split('+')
    by = said.replace('pymysql or mysqldb', 'mysqldb or pymysql')
    assert f'reaches {database} by {usual}, not by {driver}' in by
    assert f'write {database}://' in said


@pytest.mark.parametrize('url', ['oracle://h/d', 'mssql+pyodbc://h/d', 'nonsense://h/d'])
def test_a_database_that_is_unknown(url: str):
    assert 'keeps sessions in PostgreSQL, MariaDB, MySQL and SQLite' in refused(url)


@pytest.mark.parametrize(
    ('url', 'modules', 'extra'),
    [
        ('postgresql://h/d', ['psycopg'], 'postgres'),
        ('postgresql+psycopg://h/d', ['psycopg'], 'postgres'),
        ('mysql://h/d', ['pymysql', 'MySQLdb'], 'mysql'),
        ('mariadb://h/d', ['pymysql', 'MySQLdb'], 'mysql'),
        ('mariadb+pymysql://h/d', ['pymysql'], 'mysql'),
    ],
)
def test_a_driver_that_is_not_installed(
    url: str, modules: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    said = refused(url, MissingExtra)
    assert f"pip install 'celery_triggers[{extra}]'" in said


def test_a_driver_that_no_extra_brings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'MySQLdb', None)
    said = refused('mysql+mysqldb://h/d', MissingExtra)
    assert said.endswith('pip install mysqlclient')


def test_a_name_of_postgresql_that_sqlalchemy_does_not_know():
    application = Medium('sql').application(triggers_storage='postgres://h/d')
    assert application.settings.storage_location() == ('sql', 'postgres://h/d')
    assert 'write postgresql://' in refused('postgres://h/d')


@pytest.mark.parametrize('module', ['sqlalchemy', 'psycopg'])
def test_what_is_not_installed_names_its_extra(module: str):
    script = (
        f'import sys; sys.modules[{module!r}] = None\n'
        'from celery_triggers.exceptions import MissingExtra\n'
        'from celery_triggers.testing.media import Medium\n'
        'try:\n'
        "    Medium('sql', 'postgresql://h/d').backend()\n"
        'except MissingExtra as exc:\n'
        '    print(exc.extra)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, timeout=60,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert (done.stdout, done.stderr) == ('sql\n' if module == 'sqlalchemy' else 'postgres\n', '')


@pytest.mark.parametrize(
    'url',
    [
        'sqlite://', 'sqlite:///', 'sqlite:///:memory:', 'sqlite+pysqlite:///:memory:',
        'sqlite:///file:shared?mode=memory&cache=shared&uri=true',
        'sqlite:///file::memory:?cache=shared&uri=true',
    ],
)
def test_a_database_in_memory(url: str):
    assert 'lost to every other process' in refused(url)


def test_a_url_as_celery_writes_it(medium: Medium):
    """``db+`` is what names SQLAlchemy in ``result_backend``."""
    app: Any = Celery('shop', broker='memory://', set_as_current=False)
    url = f'db+{medium.url}'
    app.conf.update(
        result_backend=url, triggers_key_prefix=medium.prefix, triggers_unheard='ignore'
    )
    app.triggers.fire('order:1', 'a')
    assert medium.uids() == ['order:1']
    assert replace(medium, url=url).uids() == ['order:1']
    database_of(replace(medium, url=url).manager()).engine.dispose()


# --------------------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    'url',
    [
        f'postgresql://me:{SECRET}',
        f'nothing me:{SECRET}@h',
        f'postgresql://me:p@{SECRET}@h/d',
        f'postgresql://me:p@h:{SECRET}/d',
        f'mariadb://me:p@h:p{SECRET}@h/d',
    ],
)
def test_a_url_that_cannot_be_read_is_not_quoted(url: str):
    assert 'must be quoted' in refused(url)


@pytest.mark.parametrize(
    'place',
    [
        'postgresql://me:{}@{}/d', 'postgresql://me:x/{}@{}/d', 'postgresql://{1}/d?password={0}',
        'mariadb://me:{}@{}/d', 'mariadb://{1}/d?passwd={0}',
    ],
)
def test_a_server_that_is_away_is_named_without_a_password(place: str):
    with DatabaseProxy('postgresql://127.0.0.1:1') as proxy:
        proxy.break_()
        address = sa.make_url(proxy.through)
        url = place.format(SECRET, f'{address.host}:{address.port}')
        said = refused(url, StorageUnavailable)
    assert f'{address.host}:{address.port}/d' in said


def test_a_password_among_the_options():
    options = {'connect_args': {'password': SECRET}, 'nonsense': 1}
    said = refused('postgresql://h/d', **options)
    assert "['connect_args', 'nonsense']" in said


@pytest.mark.parametrize('scheme', ['postgresql', 'mariadb'])
def test_an_option_of_the_url_that_the_driver_does_not_know(scheme: str):
    said = refused(f'{scheme}://me:{SECRET}@127.0.0.1:1/d?nonsense=1')
    assert 'nonsense' in said


def test_what_is_stored_is_in_no_error(server: Medium):
    """The parameters of a statement that fails are kwargs of an application."""
    manager = server.manager(EACH, triggers_storage_options=SHORT)
    manager.fire('a')
    entries = database_of(manager).tables.entries
    with connected(server) as connection:
        connection.execute(sa.select(entries).with_for_update())
        with pytest.raises(StorageUnavailable) as caught:
            manager.fire('a', {'card': SECRET})
    whole = ''.join(traceback.format_exception(caught.value))
    assert f'{server.prefix}_entries' in whole
    assert SECRET not in whole


@pytest.mark.parametrize('level', ['AUTOCOMMIT', 'autocommit'])
def test_transactions_that_are_none(medium: Medium, level: str):
    """Each statement of a commit would be one of its own."""
    said = refused(str(medium.url), isolation_level=level)
    assert 'isolation_level' in said
