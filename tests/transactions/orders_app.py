"""The application of the kill test: orders, each with a firing in its transaction."""

from __future__ import annotations

import json
import os
from typing import Any

import sqlalchemy as sa
from celery import Celery

from celery_triggers.storages.sql.dialects import dialect_of

ENVIRONMENT = 'TRIGGERS_TEST_ORDERS'

class Orders:
    """The tables of the application, under one prefix."""

    def __init__(self, url: str, prefix: str):
        parsed = sa.make_url(url)
        self.engine = sa.create_engine(dialect_of(parsed).url(parsed))
        self.metadata = sa.MetaData()
        self.orders = sa.Table(
            f'{prefix}_orders', self.metadata, sa.Column('number', sa.Integer, primary_key=True)
        )
        self.shipped = sa.Table(
            f'{prefix}_shipped', self.metadata, sa.Column('number', sa.Integer, index=True)
        )

    def numbers(self, table: sa.Table) -> list[int]:
        with self.engine.connect() as connection:
            return sorted(connection.scalars(sa.select(table.c.number)))


def create(settings: dict[str, Any]) -> Any:
    """Return the application, the same in each process."""
    app: Any = Celery('orders', broker=settings['broker'], task_cls='celery_triggers:TriggerTask')
    app.conf.update(
        task_default_queue=settings['prefix'],
        triggers_storage=settings['url'],
        triggers_key_prefix=settings['prefix'],
        triggers_sweep_interval=0.5,
        triggers_dispatch_grace=1,
        worker_hijack_root_logger=False,
    )
    orders = Orders(settings['url'], settings['prefix'])

    @app.trigger_task(and_every='ordered', sessions='orders:', name='orders.ship')
    def ship(context: Any) -> None:
        with orders.engine.begin() as connection:
            connection.execute(
                sa.insert(orders.shipped), {'number': context['ordered']['number']}
            )

    return app


if ENVIRONMENT in os.environ:
    app = create(json.loads(os.environ[ENVIRONMENT]))
