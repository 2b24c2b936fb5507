"""The tables: made by whoever comes first, or by hand, and brought up to date."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_triggers.exceptions import StorageNotConfigured
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.sql.database import MOST_PREFIX, SQLDatabase, ddl
from celery_triggers.storages.sql.schema import LATEST, steps_after
from celery_triggers.testing.conformance.support import delivery, fired, statuses
from celery_triggers.testing.media import Medium
from tests.sql.places import connected, database_of, sweep

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}

BY_HAND = {'triggers_storage_options': {'create_tables': False}}

Under = Callable[[Medium, str], Medium]


def shape(medium: Medium) -> dict[str, Any]:
    """Return all that a database says of the tables: by name, without the prefix."""
    start = f'{medium.prefix}_'
    with connected(medium) as connection:
        inspector = sa.inspect(connection)
        has_options = connection.dialect.name in ('mysql', 'mariadb')
        return {
            name.removeprefix(start): {
                'columns': [
                    (column['name'], repr(column['type']), column['nullable'], column['default'])
                    for column in inspector.get_columns(name)
                ],
                'key': inspector.get_pk_constraint(name)['constrained_columns'],
                'indexes': sorted(
                    (index['name'].replace(start, ''), tuple(index['column_names']))
                    for index in inspector.get_indexes(name)
                ),
                'options': has_options and inspector.get_table_options(name),
            }
            for name in inspector.get_table_names()
            if name.startswith(start)
        }


def noted(medium: Medium) -> tuple[int, str]:
    """Return what the tables say of themselves: version and place."""
    schema = database_of(medium.manager(EACH)).tables.schema.c
    with connected(medium) as connection:
        version, place = connection.execute(sa.select(schema.version, schema.place)).one()
        return version, place


def works(medium: Medium, **settings: Any) -> None:
    """Use the tables, all of them."""
    manager = medium.manager(EACH, 'order:works', **settings)
    assert manager.fire('a', {'n': 1}, event_id='e').released == ['t_each#0']
    run = delivery(manager, 't_each#0')
    assert run.claim()
    assert run.finish(None)
    assert fired(manager) == ['a', 't_each']
    with connected(medium) as connection:
        manager.fire('a', connection=connection)
        connection.commit()
    assert statuses(manager) == {'t_each#0': 'finished', 't_each#1': 'scheduled'}
    assert sweep(manager).errors == 0
    assert medium.uids('order:w') == ['order:works']
    assert manager.storage.delete()


# ------------------------------------------------------------------------- made at once


def test_many_processes_make_the_tables_at_once(medium: Medium):
    """None fails, and all know the place by the same name."""
    start, go = os.pipe()
    told, tell = os.pipe()
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(go)
                os.read(start, 1)
                manager = medium.manager(EACH, f's:{number}')
                manager.fire('a')
                os.write(tell, f'{database_of(manager).place}\n'.encode())
                os._exit(0)
            except BaseException as exc:
                print(repr(exc), file=sys.stderr)
            finally:
                os._exit(1)
        pids.append(pid)
    for end in (go, start, tell):
        os.close(end)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    with os.fdopen(told) as places:
        assert set(places.read().split()) == {noted(medium)[1]}
    assert codes == [0] * 8
    assert noted(medium)[0] == LATEST
    assert len(medium.uids()) == 8


# ------------------------------------------------------------------------ made by hand


def test_tables_that_are_missing_and_may_not_be_made(medium: Medium):
    manager = medium.manager(EACH, **BY_HAND)
    with pytest.raises(StorageNotConfigured) as caught:
        manager.fire('a')
    said = str(caught.value)
    assert f'{medium.prefix}_*' in said
    assert 'missing' in said
    assert f'version {LATEST} is needed' in said
    assert 'celery -A <app> triggers schema --from 0' in said
    assert shape(medium) == {}
    # They are looked for again.
    run_client(medium, printed(medium))
    manager.fire('a')


def printed(medium: Medium, after: int = 0) -> str:
    return '\n'.join(ddl(str(medium.url), medium.prefix, after=after))


def run_client(medium: Medium, script: str) -> None:
    """Let the client of the database run a script, as people do."""
    url = sa.make_url(str(medium.url))
    commands: dict[str, list[str]] = {
        'postgresql': ['psql', '-q', '-v', 'ON_ERROR_STOP=1', str(medium.url)],
        'mariadb': [
            'mariadb', f'--host={url.host}', f'--port={url.port or 3306}',
            f'--user={url.username}', f'--password={url.password or ""}', str(url.database),
        ],
        'sqlite': ['sqlite3', '-bail', str(url.database)],
    }
    command = commands[url.get_backend_name()]
    if shutil.which(command[0]) is None:
        pytest.skip(f'there is no {command[0]}')
    done = subprocess.run(command, input=script, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')


def test_tables_from_what_is_printed_are_like_those_that_are_made(medium: Medium, under: Under):
    by_itself = under(medium, f'{medium.prefix}-auto')
    works(by_itself)
    run_client(medium, printed(medium))
    found = shape(medium)
    assert found == shape(by_itself)
    assert len(found) == 11
    assert found['dues']['indexes'] == [('ix_dues_at', ('at',))]
    works(medium, **BY_HAND)
    assert shape(medium) == found
    assert noted(medium)[0] == LATEST


def test_what_is_printed_names_each_place_anew(medium: Medium):
    """It may be run in several databases."""
    script = printed(medium)
    places = set()
    for _ in range(2):
        run_client(medium, script)
        version, place = noted(medium)
        assert version == LATEST
        assert len(place) == 32
        places.add(place)
        engine = database_of(medium.manager(EACH))
        engine.tables.metadata.drop_all(engine.engine)
    assert len(places) == 2


def test_nothing_is_printed_for_the_latest_version(medium: Medium):
    assert printed(medium, after=LATEST) == ''


# ----------------------------------------------------------------------- brought up to date


#: When the session of the old file was made, in milliseconds.
OLD_FILE_MADE = 1795323354699


def old_file(folder: Path) -> Medium:
    """Return a file of version 1, with a session in it."""
    file = folder / 'old.db'
    connection = sqlite3.connect(file)
    script = (Path(__file__).parent / 'version_1.sql').read_text()
    # As if it had just been made: one of its instances has a deadline, an hour later.
    later = int(time.time() * 1000) - OLD_FILE_MADE
    script = re.sub(r'\b17953[12]\d{7}\b', lambda found: str(int(found[0]) + later), script)
    connection.executescript(script)
    connection.close()
    return Medium('sql', f'sqlite:///{file}')


def check_old_session(manager: TriggerManager) -> None:
    assert statuses(manager) == {
        't_late#0': 'unstarted', 't_ship#0': 'finished', 't_thank#0': 'scheduled',
    }
    assert manager.storage.latest_kwargs['packed'] == {'box': 'ü'}
    assert manager.fire('paid', {'amount': 99}, event_id='p1').duplicate
    assert manager.fire('late').released == ['t_late#0']
    run = delivery(manager, 't_thank#0')
    assert run.claim()
    assert run.finish(None)
    assert fired(manager) == ['paid', 'packed', 't_ship', 'late', 't_thank']


def test_an_old_file_keeps_its_sessions(tmp_path: Path):
    medium = old_file(tmp_path)
    check_old_session(medium.manager({}, 'order:42'))
    assert noted(medium)[0] == LATEST
    new = Medium('sql', f'sqlite:///{tmp_path}/new.db')
    works(new)
    assert {name: of['indexes'] for name, of in shape(medium).items()} == {
        name: of['indexes'] for name, of in shape(new).items()
    }
    works(medium)


def test_an_old_file_that_is_brought_up_to_date_by_hand(tmp_path: Path):
    medium = old_file(tmp_path)
    with pytest.raises(StorageNotConfigured, match=r'of version 1, .* schema --from 1"'):
        medium.manager({}, 'order:42', **BY_HAND).fire('late')
    run_client(medium, printed(medium, after=1))
    check_old_session(medium.manager({}, 'order:42', **BY_HAND))


#: What the two steps have: twelve statements, and four.
@pytest.mark.parametrize('taken', [2, 12, 16])
def test_tables_that_somebody_died_making_are_completed(medium: Medium, taken: int):
    """Where making tables is no part of a transaction, any of them may be missing."""
    database = SQLDatabase(str(medium.url), medium.prefix, {})
    statements = [one for _, step in steps_after(0, database.tables) for one in step]
    assert len(statements) == 16
    with connected(medium) as connection:
        for statement in statements[:taken]:
            connection.execute(database.dialect.ready(statement))
        connection.commit()
    database.engine.dispose()
    works(medium)
    found = shape(medium)
    assert len(found) == 11
    assert sum(len(table['indexes']) for table in found.values()) == 5
    assert noted(medium)[0] == LATEST


def test_tables_of_other_versions(medium: Medium):
    """A place keeps its name, and the tables of a newer version are used as they are.

    Steps only add, so that processes of the version before go on while others are new.
    """
    works(medium)
    version, place = noted(medium)
    database = SQLDatabase(str(medium.url), medium.prefix, {})
    schema = database.tables.schema
    with database.engine.begin() as connection:
        connection.execute(sa.update(schema).values(version=version - 1))
    assert database.known_place() == place
    assert noted(medium) == (version, place)
    with database.engine.begin() as connection:
        connection.execute(sa.update(schema).values(version=version + 1))
    database.engine.dispose()
    for options in ({}, {'create_tables': False}):
        # Other options are another engine, which looks for the tables by itself.
        works(medium, triggers_storage_options={**options, 'pool_size': 2})
    assert noted(medium) == (version + 1, place)


# ------------------------------------------------------------------------------ prefixes

#: Others may use the same servers.
OWN = str(os.getpid())

PREFIXES = {
    'quotes': f'With-dash\'n"quotes`{OWN}',
    'marks': f'{OWN} per%cent:col;on dot.dot',
    'letters': f'back\\slash 表{OWN}',
    'longest': OWN + 'x' * (len(OWN) % 2) + 'é' * ((MOST_PREFIX - len(OWN)) // 2),
}


@pytest.mark.parametrize('what', PREFIXES)
def test_a_prefix_can_hold_anything(medium: Medium, under: Under, what: str):
    odd = under(medium, PREFIXES[what])
    works(odd)
    # Another process finds them.
    database = SQLDatabase(str(odd.url), odd.prefix, {'create_tables': False})
    assert database.known_place() == noted(odd)[1]
    database.engine.dispose()
    assert len(shape(odd)) == 11
    assert max(len(name.encode()) for name in names_of(odd)) <= 63
    assert what != 'longest' or len(odd.prefix.encode()) == MOST_PREFIX


def names_of(medium: Medium) -> list[str]:
    """Return the names of tables, indexes and keys."""
    with connected(medium) as connection:
        inspector = sa.inspect(connection)
        found = []
        for name in inspector.get_table_names():
            if name.startswith(f'{medium.prefix}_'):
                found += [name, inspector.get_pk_constraint(name)['name'] or '']
                found += [index['name'] for index in inspector.get_indexes(name)]
    assert len(found) == 11 + 11 + 5
    return found


@pytest.mark.parametrize('what', ['quotes', 'marks'])
def test_what_is_printed_for_an_odd_prefix(medium: Medium, under: Under, what: str):
    odd = under(medium, PREFIXES[what])
    run_client(odd, printed(odd))
    works(odd, **BY_HAND)


@pytest.mark.parametrize(
    'prefix', ['', 'x' * (MOST_PREFIX + 1), 'é' * 21, 'nul\x00', 'sur\ud800', 'smile😀', '%(name)s']
)
def test_a_prefix_that_names_of_tables_cannot_have(medium: Medium, prefix: str):
    with pytest.raises(StorageNotConfigured, match='triggers_key_prefix'):
        replace(medium, prefix=prefix).manager(EACH)


def test_two_prefixes_side_by_side(medium: Medium, under: Under):
    one, other = under(medium, f'shop{OWN}'), under(medium, f'shop{OWN}_eu')
    one.manager(EACH).fire('a', {'n': 1})
    other.manager(EACH).fire('a', {'n': 2})
    assert one.manager(EACH).storage.latest_kwargs == {'a': {'n': 1}}
    assert other.manager(EACH).storage.latest_kwargs == {'a': {'n': 2}}
    assert one.manager(EACH).storage.delete()
    assert (one.uids(), other.uids()) == ([], ['order:1'])
    assert noted(one)[1] != noted(other)[1]
