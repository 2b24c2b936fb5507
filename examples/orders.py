"""Order fulfilment: ship what is paid and packed; refund what is cancelled before that."""

import os
from uuid import uuid4

from celery import Celery

REDIS = os.environ.get('EXAMPLES_REDIS', 'redis://localhost:6379/0')
NAME = os.environ.get('EXAMPLES_NAME', 'orders')  # of the queue; begins the keys of sessions

app = Celery('examples.orders', broker=REDIS, task_cls='celery_triggers:TriggerTask')
app.conf.update(triggers_storage=REDIS, triggers_key_prefix=NAME, task_default_queue=NAME)


@app.trigger_task(after=['paid', 'packed'], unless=['cancelled'], sessions='order:')
def ship(context):
    box = context['packed']['box']
    print(f'{context.uid} ships box {box}')
    return {'parcel': f'P-{box}'}


@app.trigger_task(after=[ship], and_every='scanned', sessions='order:')
def track(context):
    parcel, place = context['t_ship']['parcel'], context['scanned']['place']
    print(f'{context.uid} parcel {parcel} is in {place}')


# Not after 'cancelled': a parcel that is on its way is no longer abandoned, and not refunded.
@app.trigger_task(after=['paid', 't_ship:abandoned'], sessions='order:')
def refund(context):
    amount = context['paid']['amount']
    print(f'{context.uid} refunds {amount}')
    return {'refunded': amount}


if __name__ == '__main__':
    order, cancelled = f'order:{uuid4().hex[:6]}', f'order:{uuid4().hex[:6]}'
    print(order, 'is packed, scanned, paid and scanned again')
    app.triggers.fire(order, 'packed', {'box': 'A4'})
    app.triggers.fire(order, 'scanned', {'place': 'Zwolle'})  # early: it waits for ship
    app.triggers.fire(order, 'paid', {'amount': 99})
    app.triggers.fire(order, 'scanned', {'place': 'Utrecht'})
    print(cancelled, 'is paid, cancelled, and packed too late')
    app.triggers.fire(cancelled, 'paid', {'amount': 25})
    app.triggers.fire(cancelled, 'cancelled')
    app.triggers.fire(cancelled, 'packed', {'box': 'A5'})
