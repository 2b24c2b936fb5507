"""A Django project's Celery application; run as a program, a process that takes one order.

Usage: ``python -m tests.django.shop <uid> commit|rollback|die``.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from celery import Celery

app = Celery('shop', task_cls='celery_triggers:TriggerTask')
app.config_from_object('django.conf:settings', namespace='CELERY')

ALIAS = os.environ['TRIGGERS_TEST_SHOP_STORAGE'].removeprefix('django://')


@app.trigger_task(after=['paid', 'packed'], trigger_name='t_ship', name='ship')
def ship(context: Any) -> Any:
    """Writes and fires in one transaction of its own."""
    from django.contrib.auth.models import Group
    from django.db import transaction

    with transaction.atomic(ALIAS):
        Group.objects.using(ALIAS).create(name=f'shipped {context.uid}')
        context.fire('shipped', {'box': context['packed']['box']})
    with suppress(LookupError), transaction.atomic(ALIAS):
        context.fire('lost')
        raise LookupError
    return {'by': os.getpid()}


@app.trigger_task(and_every='shipped', trigger_name='t_tell', name='tell')
def tell(context: Any) -> Any:
    return {'box': context['shipped']['box']}


@app.trigger_task(after=[tell], trigger_name='t_broken', name='broken')
def broken(context: Any) -> None:
    raise ConnectionError('no printer')


def take_order(uid: str, how: str) -> None:
    from django.contrib.auth.models import Group
    from django.db import transaction

    with suppress(LookupError), transaction.atomic(ALIAS):
        if how == 'die':
            # Before whatever else follows the commit.
            transaction.on_commit(lambda: os._exit(9), using=ALIAS)
        Group.objects.using(ALIAS).create(name=f'ordered {uid}')
        app.triggers.fire(uid, 'paid', event_id='paid')
        app.triggers.fire(uid, 'packed', {'box': uid}, event_id='packed')
        if how == 'rollback':
            raise LookupError


if __name__ == '__main__':
    import django

    django.setup()
    take_order(*sys.argv[1:])
