"""The command line: ``celery -A <app> triggers ...``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from celery.bin.celery import celery
from click.testing import CliRunner, Result

from celery_triggers.storages.sql.schema import LATEST


@pytest.fixture
def app() -> Iterator[Any]:
    """An application that ``-A cli_shop`` finds."""
    module: Any = ModuleType('cli_shop')
    module.app = Celery('cli_shop', broker='memory://', set_as_current=False)
    module.app.conf.triggers_storage = 'postgresql://user:secret@nowhere/shop'
    sys.modules['cli_shop'] = module
    yield module.app
    del sys.modules['cli_shop']


def run(*arguments: str) -> Result:
    return CliRunner().invoke(celery, ['-A', 'cli_shop', 'triggers', *arguments])


def test_the_tables_of_the_applications_database_are_printed(app: Any):
    app.conf.triggers_key_prefix = 'shop'
    printed = run('schema')
    assert printed.exit_code == 0, printed.output
    for name in ('sessions', 'instances', 'inbox', 'schema'):
        assert f'CREATE TABLE IF NOT EXISTS shop_{name} (' in printed.output
    assert f'VALUES (1, {LATEST}, ' in printed.output


def test_what_leads_from_an_older_version(app: Any):
    printed = run('schema', '--from', '1')
    assert 'CREATE TABLE IF NOT EXISTS triggers_inbox' in printed.output
    assert 'triggers_sessions' not in printed.output


def test_there_is_nothing_to_do_at_the_latest_version(app: Any):
    assert run('schema', '--from', str(LATEST)).output == ''


def test_another_database_and_prefix(app: Any):
    printed = run('schema', '--url', 'mariadb+pymysql://somewhere/x', '--prefix', 'mine')
    assert 'CREATE TABLE IF NOT EXISTS mine_sessions' in printed.output
    assert 'ENGINE=InnoDB' in printed.output


@pytest.mark.parametrize(
    ('storage', 'arguments', 'message'),
    [
        ('redis://localhost', (), "kept by the storage 'redis'"),
        ('oracle://x/y', ('--url', 'oracle://x/y'), 'not in oracle'),
        ('postgresql://x/y', ('--from', '99'), 'the latest version is'),
        (None, (), 'no storage for sessions'),
        ('postgresql://x/y', ('--prefix', 'p' * 60), '1 to 40 bytes'),
    ],
)
def test_what_cannot_be_printed_is_explained(
    app: Any, storage: str | None, arguments: tuple[str, ...], message: str
):
    app.conf.triggers_storage = storage
    app.conf.broker_url = 'amqp://'
    printed = run('schema', *arguments)
    assert printed.exit_code != 0
    assert message in printed.output
    assert 'Traceback' not in printed.output
