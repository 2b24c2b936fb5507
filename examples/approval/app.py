"""The application: a chain of plain tasks that waits in the middle for an editor."""

import os
from uuid import uuid4

from celery import Celery, chain

from celery_triggers import fire, gate
from celery_triggers.exceptions import GateAbandoned, GateExpired

REDIS = os.environ.get('EXAMPLES_REDIS', 'redis://localhost:6379/0')
NAME = os.environ.get('EXAMPLES_NAME', 'approval')  # of the queue; begins the keys in Redis

app = Celery(
    'examples.approval', broker=REDIS, backend=REDIS, task_cls='celery_triggers:TriggerTask'
)
app.conf.update(
    triggers_storage=REDIS, triggers_key_prefix=NAME, task_default_queue=NAME,
    result_backend_transport_options={'global_keyprefix': NAME},
    triggers_sweep_interval=1,  # seconds; how often workers look for deadlines
    triggers_unheard='ignore',  # 'submitted' is for the page; no task waits for it
)


@app.task
def prepare(author, title, text):
    return {'author': author, 'title': title, 'text': text, 'words': len(text.split())}


@app.task
def publish(article):
    return {**article, 'url': f'/articles/{uuid4().hex[:6]}'}


@app.task
def notify(article):
    print(f'To {article["author"]}: "{article["title"]}" is at {article["url"]}')
    return article['url']


@app.task
def give_back(request, exc, traceback, author, title):
    """Tell why there is no article. It is Celery's error callback, of the whole chain."""
    if isinstance(exc, GateExpired):
        why = 'nobody decided in time'
    elif isinstance(exc, GateAbandoned):
        rejected = app.triggers.session(exc.uid).storage.latest_kwargs.get('rejected', {})
        why = rejected.get('reason', exc.reason)
    else:
        why = 'something went wrong'
    print(f'To {author}: "{title}" is not published: {why}')


def submit(author, title, text, within=3 * 24 * 3600):
    """Send an article on its way; return its session and the result of the chain."""
    uid = f'article:{uuid4().hex[:8]}'
    canvas = chain(
        prepare.s(author, title, text),
        fire.s(uid, 'submitted'),
        gate(
            publish.s(), after=['approved'], unless=['rejected'], within=within,
            uid=uid, trigger_name='t_publish',
        ),
        notify.s(),
    )
    canvas.on_error(give_back.s(author, title))
    return uid, canvas.delay()
