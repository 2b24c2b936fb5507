"""A batch of uploads, of which nobody knows how many there are before the last."""

import os
from uuid import uuid4

from celery import Celery

from celery_triggers import kwarg, on

REDIS = os.environ.get('EXAMPLES_REDIS', 'redis://localhost:6379/0')
NAME = os.environ.get('EXAMPLES_NAME', 'uploads')  # of the queue; begins the keys of sessions

app = Celery('examples.uploads', broker=REDIS, task_cls='celery_triggers:TriggerTask')
app.conf.update(triggers_storage=REDIS, triggers_key_prefix=NAME, task_default_queue=NAME)


@app.trigger_task(and_every='uploaded', sessions='batch:')
def process(context):
    upload = context['uploaded']
    return {'file': upload['file'], 'words': len(upload['text'].split())}


@app.trigger_task(after=[on('uploaded', times=kwarg('closed', 'count'))], sessions='batch:')
def confirm(context):
    files = [upload['file'] for upload in context.firings('uploaded')]
    print(f'{context.uid} has come whole: {", ".join(files)}')
    return {'files': files}


@app.trigger_task(
    after=[on(process, times=kwarg('closed', 'count'), as_='last')], sessions='batch:'
)
def merge(context):
    words = {part['file']: part['words'] for part in context.firings('t_process')}
    last = context['last']['file']
    print(f'{context.uid} has {sum(words.values())} words; {last} was processed last')
    return {'words': words}


def upload(batch, file, text):
    # The event id makes a repeat harmless: an upload that is sent twice counts once.
    return app.triggers.fire(
        batch, 'uploaded', {'file': file, 'text': text}, event_id=f'upload {file}'
    )


def close(batch, count):
    return app.triggers.fire(batch, 'closed', {'count': count}, event_id='closed')


if __name__ == '__main__':
    batch = f'batch:{uuid4().hex[:6]}'
    upload(batch, 'a.txt', 'to be or not to be')
    upload(batch, 'b.txt', 'that is the question')
    again = upload(batch, 'a.txt', 'to be or not to be')
    print(batch, 'a.txt came twice; the second time counts:', not again.duplicate)
    upload(batch, 'c.txt', 'whether it is nobler')
    close(batch, count=3)
    print(batch, 'is closed after 3 files')
