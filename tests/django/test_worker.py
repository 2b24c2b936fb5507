"""A real worker of a Django project, whose processes share the project's database."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django
import pytest
import redis

from tests.django import databases
from tests.django.conftest import prepared, project_app
from tests.parts.processes import end
from tests.parts.servers import BROKER_DB, redis_url
from tests.parts.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Shop:
    """The project as other processes find it."""

    alias: str
    name: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ, 'C_FORCE_ROOT': '1', 'PYTHONPATH': str(ROOT),
            'DJANGO_SETTINGS_MODULE': 'tests.django.shop_settings',
            'TRIGGERS_TEST_SHOP': self.name,
            'TRIGGERS_TEST_SHOP_STORAGE': f'django://{self.alias}',
        }

    def start_worker(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, '-m', 'celery', '-A', 'tests.django.shop', 'worker', '--pool',
            'prefork', '--concurrency', '2', '--hostname', f'{self.name}@test', '--loglevel',
            'INFO', '--without-gossip', '--without-mingle', '--without-heartbeat',
        ]
        with self.log.open('ab') as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )

    def take_order(self, uid: str, how: str) -> int:
        """Take an order in another process; return its exit status."""
        command = [sys.executable, '-m', 'tests.django.shop', uid, how]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, timeout=60, capture_output=True,
            text=True, check=False,
        )
        assert done.returncode in (0, 9), done.stderr
        return done.returncode

    def storage(self, uid: str) -> Any:
        return project_app(f'django://{self.alias}', self.name).triggers.session(uid).storage

    def status(self, uid: str, name: str, *wanted: str) -> Any:
        """Wait until an instance has one of these statuses; return it."""

        def instance() -> Any:
            found = self.storage(uid).instances.get(name)
            return found if found is not None and found.status in wanted else None

        return eventually(instance, f'{name} of {uid} is {wanted}: {self.log.read_text()}')

    def own_rows(self) -> list[str]:
        from django.contrib.auth.models import Group

        return sorted(Group.objects.using(self.alias).values_list('name', flat=True))


# The default one is SQLite, whose transactions begin as celery_triggers.W006 recommends.
@pytest.fixture(params=['default', 'postgresql'])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    alias = prepared(request.param)
    if alias == 'default' and django.VERSION < (5, 1):
        pytest.skip('in this Django they cannot')
    shop = Shop(alias, f'shop-{secrets.token_hex(5)}', tmp_path / 'worker.log')
    worker = shop.start_worker()
    try:
        ready = f'{shop.name}@test ready.'
        eventually(lambda: ready in shop.log.read_text(), f'a worker: {shop.log.read_text()}')
        yield shop
    finally:
        end(worker)
        _clear(alias)
        with redis.Redis.from_url(redis_url(BROKER_DB)) as client:
            for key in client.scan_iter(f'*{shop.name}*'):
                client.delete(key)


def _clear(alias: str) -> None:
    from django.contrib.auth.models import Group

    Group.objects.using(alias).all().delete()
    databases.clear(alias)


def check_order(shop: Shop, uid: str) -> None:
    """An order that was committed went through the worker, once."""
    failed = shop.status(uid, 't_broken#0', 'failed')
    assert failed.metadata['exception']['type'] == 'ConnectionError'
    assert shop.storage(uid)['t_tell#0'].result == {'box': uid}
    triggers = [record.trigger for record in shop.storage(uid).history]
    # What a task fires in its transaction may be applied before or after its own end.
    assert sorted(triggers) == sorted(
        ['paid', 'packed', 'shipped', 't_ship', 't_tell', 't_broken:failed']
    )


def test_orders_that_are_committed_are_shipped_and_no_others(shop: Shop):
    """Also where the process dies between its commit and applying what it has fired."""
    fates = {'order:1': 'commit', 'order:2': 'rollback', 'order:3': 'die', 'order:4': 'commit'}
    codes = {uid: shop.take_order(uid, how) for uid, how in fates.items()}
    assert codes == {'order:1': 0, 'order:2': 0, 'order:3': 9, 'order:4': 0}
    for uid in ('order:1', 'order:3', 'order:4'):
        check_order(shop, uid)
    assert not shop.storage('order:2').exists
    assert shop.own_rows() == [
        f'{what} order:{n}' for what in ('ordered', 'shipped') for n in (1, 3, 4)
    ]
    check_log(shop)


def check_log(shop: Shop) -> None:
    log = shop.log.read_text()
    for word in ('OperationalError', 'InterfaceError', 'locked', 'StorageUnavailable'):
        assert word not in log, log


def test_a_worker_outlives_a_restart_of_the_server(shop: Shop):
    if shop.alias == 'default':
        pytest.skip('it has no server')
    shop.take_order('order:1', 'commit')
    check_order(shop, 'order:1')
    end_all_connections(shop.alias)
    shop.take_order('order:2', 'commit')
    check_order(shop, 'order:2')
    check_log(shop)


def end_all_connections(alias: str) -> None:
    """End all connections but this one, of the worker's parent and children that is."""
    from django.db import connections

    with connections[alias].cursor() as cursor:
        cursor.execute(
            'SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity'
            ' WHERE application_name = %s AND pid <> pg_backend_pid()',
            [os.environ['TRIGGERS_TEST_DJANGO_NAME']],
        )
        assert cursor.fetchone()[0] >= 1
