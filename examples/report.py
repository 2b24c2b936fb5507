"""A report that waits for three feeds, or makes do with what there is at closing time."""

import os
from datetime import date, datetime, time, timedelta, timezone
from uuid import uuid4

from celery import Celery

REDIS = os.environ.get('EXAMPLES_REDIS', 'redis://localhost:6379/0')
NAME = os.environ.get('EXAMPLES_NAME', 'report')  # of the queue; begins the keys of sessions

app = Celery('examples.report', broker=REDIS, task_cls='celery_triggers:TriggerTask')
app.conf.update(
    triggers_storage=REDIS, triggers_key_prefix=NAME, task_default_queue=NAME,
    triggers_sweep_interval=1,  # seconds; how often workers look for deadlines
)


@app.trigger_task(after=['sales', 'stock', 'weather'], sessions='report:')
def report(context):
    print(f'{context.uid} is whole')
    return {feed: context[feed]['figure'] for feed in ('sales', 'stock', 'weather')}


@app.trigger_task(after=['t_report:expired'], sessions='report:')
def report_what_there_is(context):
    late = context['t_report:expired']
    print(f'{context.uid} lacks {", ".join(late["missing"])}')
    return {feed: context.firings(feed)[0]['figure'] for feed in late['received']}


def expect(uid, until):
    """Wait for the feeds of a report until some moment; none of them need come."""
    app.triggers.session(uid).start(until={'t_report': until})


if __name__ == '__main__':
    whole, part = f'report:{uuid4().hex[:6]}', f'report:{uuid4().hex[:6]}'
    tomorrow = date.today() + timedelta(days=1)
    expect(whole, until=datetime.combine(tomorrow, time(18), timezone.utc))
    expect(part, until=datetime.now(timezone.utc) + timedelta(seconds=3))
    for feed, figure in {'sales': 120, 'stock': 48, 'weather': 21}.items():
        app.triggers.fire(whole, feed, {'figure': figure})
    app.triggers.fire(part, 'stock', {'figure': 48})
    print(whole, 'waited until tomorrow 18:00 UTC, and has its three feeds already')
    print(part, 'has one feed, and gives up in three seconds')
