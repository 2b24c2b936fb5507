"""What a person does. Each step is saved and fired together, in one transaction."""

from functools import partial

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from examples.django_questionnaire.celery import app
from examples.django_questionnaire.questionnaires.models import Applicant, Page, Run


class ChangedMeanwhile(Exception):
    """What the person was looking at has changed since, in another tab say."""


class PageMissing(Exception):
    """A page was not saved yet."""


class Withdrawn(Exception):
    """The questionnaire was withdrawn, and changes no more."""


def fire(uid, trigger_name, trigger_kwargs, event_id):
    """Fire a trigger as a part of the open transaction: both happen, or neither.

    Another storage than ``django`` is no part of it. Then it is fired after the commit, and if
    the process dies in between, never; whatever is repeated fires it again, with its event id.
    """
    call = partial(app.triggers.fire, uid, trigger_name, trigger_kwargs, event_id=event_id)
    if settings.CELERY_TRIGGERS_STORAGE.startswith('django'):
        call()
    else:
        transaction.on_commit(call)


def become_applicant(id_):
    """Return an applicant. The id comes from the form, so that a second click makes no other."""
    return Applicant.objects.get_or_create(id=id_)[0]


def start(applicant, questionnaire):
    """Return the applicant's run through a questionnaire, a new one at most once."""
    return Run.objects.get_or_create(applicant=applicant, questionnaire=questionnaire.slug)[0]


@transaction.atomic
def save_page(run_id, number, answers, based_on):
    """Save the answers of a page and fire ``page<number>``.

    Answers that are there already (a second click) are not saved anew, but fired with the same
    event id: that does nothing, unless the first firing was lost.

    Args:
        based_on: The revision that the person was looking at, 0 for an empty page.

    Raises:
        ChangedMeanwhile: There is another revision by now.
        Withdrawn: The questionnaire was withdrawn.
    """
    run = _open_run(run_id)
    page = run.pages.filter(number=number).first() or Page(run=run, number=number)
    if page.answers != answers or page.revision == 0:
        if page.revision != based_on:
            raise ChangedMeanwhile
        page.answers = answers
        page.revision += 1
        page.save()
    _fire_page(run, page)


@transaction.atomic
def send(run_id, version):
    """Send a questionnaire: fire ``completed``, once for each version of the answers.

    Args:
        version: The one that the person was looking at.

    Raises:
        PageMissing: A page was not saved yet.
        ChangedMeanwhile: There is another version by now.
        Withdrawn: The questionnaire was withdrawn.
    """
    run = _open_run(run_id)
    if run.first_missing is not None:
        raise PageMissing
    if run.version != version:
        raise ChangedMeanwhile
    if run.sent_version != version:
        run.sent_version, run.sent_at = version, timezone.now()
        run.save()
    for page in run.pages.all():
        # In case a storage of its own has missed one, see fire().
        _fire_page(run, page)
    fire(run.uid, 'completed', {'version': version}, event_id=f'completed-{version}')


@transaction.atomic
def withdraw(run_id):
    """Withdraw a questionnaire for good, and fire ``withdrawn``."""
    run = Run.objects.select_for_update().get(id=run_id)
    if run.withdrawn_at is None:
        run.withdrawn_at = timezone.now()
        run.save()
    fire(run.uid, 'withdrawn', {}, event_id='withdrawn')


def _open_run(run_id):
    # Locked, so that two tabs take turns. (SQLite has locked the whole file by now.)
    run = Run.objects.select_for_update().get(id=run_id)
    if run.withdrawn_at is not None:
        raise Withdrawn
    return run


def _fire_page(run, page):
    fire(
        run.uid, f'page{page.number}', {'answers': page.answers, 'revision': page.revision},
        event_id=f'page{page.number}-{page.revision}',
    )
