"""What the pages that change by themselves show: results, and what is still to come."""

from django.conf import settings

from celery_triggers import Status
from examples.django_questionnaire.celery import app
from examples.django_questionnaire.questionnaires.forms import QUESTIONNAIRES
from examples.django_questionnaire.questionnaires.models import Seat, Summary, TimelineEntry

MOVING = {Status.SCHEDULED, Status.RUNNING}


def at_run(run):
    """Return what the page of a run shows."""
    pages = list(run.pages.all())
    comparisons = {
        found.number: found for found in run.comparisons.all() if found.revision
    }
    summary = Summary.objects.filter(run=run, version__gt=0).first()
    expected = run.questionnaire == 'survey' and any(
        page.number not in comparisons or comparisons[page.number].revision != page.revision
        for page in pages
    )
    expected = expected or (run.sent_version > 0 and (
        summary is None or summary.version != run.sent_version
    ))
    return {
        'run': run,
        'pages': [
            (page, run.shape.form(page.number).title, comparisons.get(page.number))
            for page in pages
        ],
        'summary': summary,
        **_going_on([run.uid], expected=expected and not run.withdrawn_at),
    }


def at_applicant(applicant):
    """Return what the page of an applicant shows."""
    runs = {run.questionnaire: run for run in applicant.runs.all()}
    seat = Seat.objects.filter(applicant=applicant).first()
    withdrawn = any(run.withdrawn_at for run in runs.values())
    ready = {
        slug for slug, number in (('survey', 3), ('registration', 6))
        if slug in runs and runs[slug].pages.filter(number=number).exists()
    }
    expected = (
        seat is not None and seat.given_back_at is None if withdrawn
        else len(ready) == 2 and seat is None
    )
    return {
        'applicant': applicant,
        'questionnaires': [(shape, runs.get(slug)) for slug, shape in QUESTIONNAIRES.items()],
        'seat': seat,
        'withdrawn': withdrawn,
        'ready': ready,
        **_going_on([applicant.uid, *(run.uid for run in runs.values())], expected=expected),
    }


def _going_on(uids, *, expected):
    """Return whether more is to come, and what the first of the sessions has to say.

    Args:
        expected: Whether something has to come of what was saved.
    """
    storages = [app.triggers.session(uid).storage for uid in uids]
    statuses = {instance.status for storage in storages for instance in storage}
    failed = Status.FAILED in statuses
    return {
        'failed': failed,
        'waiting': not failed and (expected or bool(statuses & MOVING)),
        'uid': uids[0],
        'storage': storages[0].key,
        'manager': settings.CELERY_TRIGGERS_MANAGER,
        'explained': [str(each) for each in app.triggers.session(uids[0]).explain()],
        'timeline': TimelineEntry.objects.filter(uid=uids[0]),
    }
