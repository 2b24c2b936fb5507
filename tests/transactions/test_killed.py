"""Processes that are killed around the commits of their own transactions (PostgreSQL).

Each order is a row of the application's and a firing, in one transaction; every third is
rolled back. The customers are killed at every point between the transaction and the message.
Whatever is committed is shipped by a real worker, once, and nothing else is.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from celery_triggers.manager import pending
from celery_triggers.storages.relational import RelationalStorageBackend
from celery_triggers.testing.conformance.test_forks import in_child
from celery_triggers.wiring import services_of
from tests.parts import servers, waiting
from tests.parts.processes import end
from tests.transactions import orders_app
from tests.transactions.orders_app import Orders

TRANSACTIONS = 1000
SESSIONS = 20

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Shop:
    """The application with its tables, its worker, and what a process needs to build it."""

    settings: dict[str, Any]
    app: Any
    orders: Orders
    worker: subprocess.Popen[bytes]
    log: Path


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    prefix = f'shop-{secrets.token_hex(4)}'
    settings = {
        'prefix': prefix,
        'url': servers.fast(servers.POSTGRESQL),
        'broker': servers.redis_url(servers.BROKER_DB),
    }
    app = orders_app.create(settings)
    orders = Orders(settings['url'], prefix)
    orders.metadata.create_all(orders.engine)
    log = tmp_path / 'worker.log'
    with log.open('wb') as out:
        worker = subprocess.Popen(
            [
                sys.executable, '-m', 'celery', '-A', 'tests.transactions.orders_app', 'worker',
                '--concurrency', '2', '--without-gossip', '--without-mingle', '--loglevel', 'INFO',
            ],
            cwd=ROOT, start_new_session=True, stdout=out, stderr=subprocess.STDOUT,
            env={
                **os.environ, 'C_FORCE_ROOT': '1', orders_app.ENVIRONMENT: json.dumps(settings),
            },
        )
    try:
        yield Shop(settings, app, orders, worker, log)
    finally:
        end(worker)
        app.close()
        database = app.triggers.session('orders:0').storage._database
        database.tables.metadata.drop_all(database.engine)
        orders.metadata.drop_all(orders.engine)
        orders.engine.dispose()
        with redis.Redis.from_url(settings['broker']) as client:
            client.delete(prefix, f'_kombu.binding.{prefix}')


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_instead(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda _app: setattr(owner, name, die)


def _die_after_sending(app: Any) -> None:
    real = services_of(app)._dispatcher.dispatch

    def dispatch(releases: Any) -> int:
        sent: int = real(releases)
        die()
        return sent

    services_of(app)._dispatcher.dispatch = dispatch


#: Where a customer is killed, after what came before it went well.
POINTS: dict[str, Callable[[Any], None]] = {
    'in the transaction': _die_instead(sa.Connection, 'commit'),
    'committed': _die_instead(pending, 'apply_stored'),
    'seen in the inbox': _die_instead(pending, '_apply'),
    'applied': _die_instead(RelationalStorageBackend, 'forget_firing'),
    'forgotten, not sent': _die_instead(pending, 'follow_up'),
    'sent': _die_after_sending,
}


def rolls_back(number: int) -> bool:
    return number % 3 == 0


def order(shop: Shop, engine: sa.Engine, number: int) -> None:
    """Make an order, or begin to and change one's mind."""
    with engine.connect() as connection:
        connection.execute(sa.insert(shop.orders.orders), {'number': number})
        shop.app.triggers.fire(
            f'orders:{number % SESSIONS}', 'ordered', {'number': number}, connection=connection
        )
        if rolls_back(number):
            connection.rollback()
        else:
            connection.commit()


def customer(shop: Shop, first: int, last: int, point: str) -> None:
    """Make some orders, and be killed at a point of the last one that is not taken back."""
    engine = sa.create_engine(shop.orders.engine.url)
    fatal = max((n for n in range(first, last) if not rolls_back(n)), default=-1)
    for number in range(first, last):
        if number == fatal:
            POINTS[point](shop.app)
        order(shop, engine, number)


def test_what_is_committed_is_shipped_and_nothing_else(
    shop: Shop, record_property: Callable[[str, Any], None]
):
    chance, number, killed = random.Random(7), 0, Counter[str]()
    points = sorted(POINTS)
    with shop.orders.engine.connect() as dawdler:
        # Open all the time, with a firing into each session: nobody waits for it.
        for session in range(SESSIONS):
            shop.app.triggers.fire(
                f'orders:{session}', 'ordered', {'number': -1}, connection=dawdler
            )
        while number < TRANSACTIONS:
            point = points[number % len(points)]
            last = min(TRANSACTIONS, number + chance.randint(3, 9))
            code = in_child(lambda a=number, b=last, p=point: customer(shop, a, b, p))
            # Late points are not reached where the worker's sweep was quicker.
            assert code in (-signal.SIGKILL, 0), (point, code)
            killed[point] += code != 0
            number = last
        committed = shop.orders.numbers(shop.orders.orders)
        waiting.eventually(
            lambda: len(shop.orders.numbers(shop.orders.shipped)) >= len(committed),
            'everything is shipped', timeout=60,
        )
        dawdler.rollback()
    waiting.eventually(lambda: _is_done(shop), 'the worker has ended everything', timeout=30)
    check(shop, committed, killed)
    record_property('killed', dict(killed))
    record_property('committed', len(committed))


def _is_done(shop: Shop) -> bool:
    storages = [shop.app.triggers.session(f'orders:{n}').storage for n in range(SESSIONS)]
    return all(s.load().head.unresolved == 0 for s in storages)


def check(shop: Shop, committed: list[int], killed: Counter[str]) -> None:
    cut_off = killed['in the transaction']
    taken_back = sum(rolls_back(number) for number in range(TRANSACTIONS))
    assert len(committed) == TRANSACTIONS - taken_back - cut_off
    assert min(killed.values()) > 10
    assert shop.orders.numbers(shop.orders.shipped) == committed, 'each once, nothing else'
    fired = Counter(
        record.kwargs['number']
        for session in range(SESSIONS)
        for record in shop.app.triggers.session(f'orders:{session}').storage.history
        if record.trigger == 'ordered'
    )
    assert fired == Counter(committed), 'each applied once'
    storage = shop.app.triggers.session('orders:0').storage
    with storage._database.engine.connect() as connection:
        inbox = storage._database.tables.inbox
        left = connection.scalar(sa.select(sa.func.count()).select_from(inbox))
    assert left == 0
    assert 'Traceback' not in shop.log.read_text(), shop.log.read_text()
