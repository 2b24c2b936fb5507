"""A nightly canvas of plain tasks that waits in the middle until the warehouse is open."""

import os
from datetime import date
from uuid import uuid4

from celery import Celery, chain, chord
from celery.schedules import crontab

from celery_triggers import fire, gate

REDIS = os.environ.get('EXAMPLES_REDIS', 'redis://localhost:6379/0')
NAME = os.environ.get('EXAMPLES_NAME', 'nightly')  # of the queue; begins the keys in Redis

app = Celery(
    'examples.nightly', broker=REDIS, backend=REDIS, task_cls='celery_triggers:TriggerTask'
)
app.conf.update(
    triggers_storage=REDIS, triggers_key_prefix=NAME, task_default_queue=NAME,
    result_backend_transport_options={'global_keyprefix': NAME},
    beat_schedule={
        'nightly': {'task': 'examples.nightly.begin', 'schedule': crontab(hour=1, minute=0)},
    },
)


@app.task
def extract(night):
    return [{'shop': 'web', 'amount': 30}, {'shop': 'dam', 'amount': 12},
            {'shop': 'web', 'amount': 5}]


@app.task
def total(orders, shop):
    return {shop: sum(order['amount'] for order in orders if order['shop'] == shop)}


@app.task
def load(totals):
    return {shop: amount for part in totals for shop, amount in part.items()}


@app.task
def tell(loaded, night):
    print(f'{night} is loaded: {loaded}')
    return loaded


@app.task
def back_up():
    print('the warehouse is backed up')


def import_orders(night):
    """The night's work. Its chord waits for two tasks, and its body for the warehouse too."""
    return chain(
        extract.s(night),
        chord(
            [total.s('web'), total.s('dam')],
            gate(load.s(), after=['warehouse_open'], within=6 * 3600, uid=f'night:{night}'),
        ),
        tell.s(night),
    )


def open_warehouse(night):
    """The warehouse's own canvas, which knows nothing of who waits for it."""
    return chain(back_up.si(), fire.si(f'night:{night}', 'warehouse_open'))


@app.task
def begin(night=None):
    import_orders(night or date.today().isoformat()).delay()


if __name__ == '__main__':
    night = uuid4().hex[:6]
    begin.delay(night)
    open_warehouse(night).delay()
    print(f'{night} has begun, and the warehouse opens; see the worker')
