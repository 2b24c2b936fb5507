"""The application: four trigger tasks, which are all of the workflow.

Nothing calls these tasks. They run when what their decorators name has happened in the
respondent's session, in whatever order it happened.
"""

from __future__ import annotations

from celery_triggers import Celery, TaskContext
from examples.questionnaire import rows
from examples.questionnaire.places import Places

places = Places.from_environ()

app = Celery('questionnaire', broker=places.broker)
app.conf.update(
    triggers_storage=places.storage,
    triggers_key_prefix=places.name,
    triggers_manager='finalizing',  # fires sessionFinalized once nothing is left to do
    broker_transport=places.transport,
    broker_transport_options=places.transport_options,
    task_default_queue=places.name,
    task_ignore_result=True,
)


@app.trigger_task(
    trigger_name='t_importSubject',
    after=['firstPageReceived', 'questionnaireComplete'],
    sessions='respondent:',
)
def import_subject(context: TaskContext) -> dict[str, int]:
    """Make a subject of a respondent who finished."""
    device = context['firstPageReceived']['device']
    subject = rows.add(
        rows.subjects, uid=context.uid, instance=context.instance_name, device=device
    )
    return {'subject': subject}


@app.trigger_task(
    trigger_name='t_importResponses',
    after=['t_importSubject'],
    and_every='pageReceived',
    sessions='respondent:',
)
def import_responses(context: TaskContext) -> None:
    """Write the answers of one page; every page gets an instance of its own."""
    page = context['pageReceived']
    rows.add(
        rows.responses,
        uid=context.uid,
        instance=context.instance_name,
        subject=context['t_importSubject']['subject'],
        page=page['page'],
        revision=page['revision'],
        **page['answers'],
    )


@app.trigger_task(
    trigger_name='t_importBrowserMetadata',
    after=['t_importSubject', 'pageReceived'],
    unless=['isEmbeddedApplication'],
    sessions='respondent:',
)
def import_browser_metadata(context: TaskContext) -> None:
    """Write which browser the first page came from; an embedded application has none."""
    rows.add(
        rows.browsers,
        uid=context.uid,
        instance=context.instance_name,
        subject=context['t_importSubject']['subject'],
        browser=context['pageReceived']['browser'],
    )


@app.trigger_task(
    trigger_name='t_markComplete', after=['sessionFinalized'], sessions='respondent:'
)
def mark_complete(context: TaskContext) -> None:
    """Note that everything about a respondent has been imported."""
    rows.add(rows.completions, uid=context.uid, instance=context.instance_name)
