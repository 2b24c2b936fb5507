"""What time it is: the server's wall clock tells, in every statement of a transaction anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from celery_triggers.engine.session import Plan
from celery_triggers.storages.relational.database import Wanted
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium
from tests.parts.waiting import eventually
from tests.sql.places import connected, database_of

TASKS: dict[str, Any] = {'t_each': {'andEvery': 'a', 'run': 'x'}}

#: Long ago, for a host whose clock is wrong.
WRONG = 1_000_000_000


@pytest.fixture
def wrong_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('celery_triggers.storages.sql.dialects.host_time', lambda: WRONG)


def test_a_transaction_sees_time_go_on(medium: Medium):
    database = database_of(medium.manager(TASKS))
    database.run(_wait, write=True)


def _wait(transaction: Any) -> None:
    nothing = Wanted('sid', [], [], [], '')
    for ask in (
        lambda: transaction.find(nothing).now,
        lambda: transaction.next_due()[0],
        lambda: transaction.last_sweep()[0],
    ):
        eventually(partial(_has_come, ask() + 5, ask), timeout=5)


def _has_come(moment: int, ask: Callable[[], int]) -> bool:
    return ask() >= moment


def server_time(medium: Medium) -> int:
    """Return the server's time in milliseconds, whatever zone it is in."""
    asked = {
        'sql-postgresql': 'SELECT extract(epoch FROM clock_timestamp()) * 1000',
        'sql-mariadb': "SELECT timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) / 1000",
    }[medium.name]
    with connected(medium) as connection:
        return int(connection.exec_driver_sql(asked).scalar_one())


def told(medium: Medium, **settings: Any) -> list[int]:
    """Return the moments that a storage tells or stores, in the order in which they come."""
    manager = medium.manager(TASKS, 'order:2', **settings)
    before = manager.storage.read(Plan()).now
    firing = manager.fire('a')
    run = delivery(manager, 't_each#0')
    assert run.claim()
    claimed = manager.storage['t_each#0'].record.claimed
    storage = manager.storage
    taken = storage.take_due(storage.url, storage.settings, limit=1, push=1, gap=1)
    return [before, int(firing.at.timestamp() * 1000), claimed, taken.now]


@pytest.mark.usefixtures('wrong_host')
def test_the_time_is_the_servers_and_not_the_hosts(server: Medium):
    before = server_time(server)
    found = told(server)
    after = server_time(server)
    assert [before, *found, after] == sorted([before, *found, after])


@pytest.mark.usefixtures('wrong_host')
def test_a_file_has_the_hosts_time(medium: Medium):
    if medium.name != 'sql-sqlite':
        pytest.skip('a server has its own')
    assert told(medium) == [WRONG] * 4


ZONES = {
    # Half an hour off, and with an hour that comes twice.
    'sql-postgresql': ['-c TimeZone=Asia/Kolkata', '-c TimeZone=Europe/Berlin'],
    'sql-mariadb': ["SET time_zone = '+05:30'", "SET time_zone = '-11:00'"],
}


@pytest.mark.parametrize('number', [0, 1])
def test_the_time_zone_of_a_connection_means_nothing(server: Medium, number: int):
    option = 'options' if server.name == 'sql-postgresql' else 'init_command'
    options = {'connect_args': {option: ZONES[server.name][number]}}
    before = server_time(server)
    found = told(server, triggers_storage_options=options)
    assert [before, *found] == sorted([before, *found])
    assert found[-1] - before < 60_000
