"""The trigger tasks: all that happens after a page, without anybody calling it.

A task may run again after a crash, and two instances of one task may run at the same time. So
each writes what it finds to a row of its own, and never over something newer.
"""

from django.db import transaction
from django.utils import timezone

from celery_triggers import shared_trigger_task
from examples.django_questionnaire.celery import app
from examples.django_questionnaire.questionnaires import comparing
from examples.django_questionnaire.questionnaires.models import (
    Applicant,
    Comparison,
    Message,
    Page,
    Run,
    Seat,
    Summary,
)

SURVEY, REGISTRATION = 'questionnaire:survey:', 'questionnaire:registration:'
TABLES = ['North', 'East', 'South', 'West']


# -------------------------------------------------------------- the session of the survey


@shared_trigger_task(and_every='page1', unless=['withdrawn'], sessions=SURVEY)
def compare_about_you(context):
    return _compare(context, 1)


@shared_trigger_task(and_every='page2', unless=['withdrawn'], sessions=SURVEY)
def compare_news(context):
    return _compare(context, 2)


@shared_trigger_task(and_every='page3', unless=['withdrawn'], sessions=SURVEY)
def compare_politics(context):
    return _compare(context, 3)


def _compare(context, number):
    """Compare the answers of a page with the respondents'; a correction counts anew."""
    fired = context[f'page{number}']
    run = _run_of(context)
    found = comparing.page(number, fired['answers'])
    with transaction.atomic():
        Comparison.objects.get_or_create(run=run, number=number)
        # An older instance may come late. It changes nothing.
        Comparison.objects.filter(
            run=run, number=number, revision__lt=fired['revision']
        ).update(revision=fired['revision'], lines=found)
    return {'revision': fired['revision']}


@shared_trigger_task(
    after=['page1', 'page2', 'page3'], and_every='completed', unless=['withdrawn'],
    sessions=SURVEY, trigger_name='t_summarize',
)
def summarize_survey(context):
    """Summarize each version that was sent, from the pages as they were sent."""
    answers = {**context['page1']['answers'], **context['page2']['answers'],
               **context['page3']['answers']}
    _summarize(context, comparing.nearest(answers))


# --------------------------------------------------------- the session of the registration


@shared_trigger_task(after=['page1'], unless=['withdrawn'], sessions=REGISTRATION)
def welcome(context):
    """Say hello, once, however often the page is corrected."""
    answers = context['page1']['answers']
    _tell(context, _run_of(context).applicant,
          f'Welcome, {answers["name"]}! We write to {answers["email"]}.')


@shared_trigger_task(
    after=[f'page{number}' for number in range(1, 7)], and_every='completed',
    unless=['withdrawn'], sessions=REGISTRATION, trigger_name='t_summarize',
)
def summarize_registration(context):
    """Confirm each version that was sent."""
    topics = context['page5']['answers']['topics']
    _summarize(context, [
        f'We have the registration of {context["page1"]["answers"]["name"]}.',
        f'You would like to talk about {len(topics)} of our topics.',
    ])


# --------------------------------------- from both of them to the session of the applicant


@shared_trigger_task(and_every='page3', sessions=SURVEY, trigger_name='t_tell_applicant')
def tell_of_survey(context):
    _fire_at_applicant(context, 'survey_page3')


@shared_trigger_task(and_every='page6', sessions=REGISTRATION, trigger_name='t_tell_applicant')
def tell_of_registration(context):
    _fire_at_applicant(context, 'registration_page6')


@shared_trigger_task(after=['withdrawn'], sessions='questionnaire:')
def tell_of_withdrawal(context):
    _fire_at_applicant(context, 'withdrawn')


def _fire_at_applicant(context, trigger):
    """Fire into the super session. The event id is that of this instance, run after run."""
    run = _run_of(context)
    app.triggers.fire(
        run.applicant.uid, trigger, {'run': str(run.id)},
        event_id=f'{context.uid} {context.instance_name}',
    )


# ----------------------------------------------------------- the session of the applicant


@shared_trigger_task(
    after=['survey_page3', 'registration_page6'], unless=['withdrawn'], sessions='applicant:'
)
def give_seat(context):
    """Seat an applicant where the fewest think alike.

    It looks the answers up: they may have been corrected since the pages were fired.
    """
    applicant = _applicant_of(context)
    view = _view(_answers(context['survey_page3']['run'], 3)['place'])
    day = _answers(context['registration_page6']['run'], 6)['day']
    with transaction.atomic():
        seat, _ = Seat.objects.get_or_create(
            applicant=applicant,
            defaults={'day': day, 'view': view, 'table': _best_table(day, view)},
        )
    _tell(context, applicant, f'You have a seat: {seat}.')
    return {'table': seat.table, 'day': seat.day}


@shared_trigger_task(after=['t_give_seat', 'withdrawn'], sessions='applicant:')
def take_seat_back(context):
    """Give the seat to others where the withdrawal came too late to prevent it."""
    applicant = _applicant_of(context)
    Seat.objects.filter(applicant=applicant, given_back_at=None).update(
        given_back_at=timezone.now()
    )
    _tell(context, applicant, 'You have withdrawn, and others may have your seat.')


def _answers(run_id, number):
    return Page.objects.get(run_id=run_id, number=number).answers


def _view(place):
    return 'liberal' if place < 4 else 'moderate' if place == 4 else 'conservative'


def _best_table(day, view):
    """Return the table with the fewest of this view, and then with the fewest people."""
    taken = Seat.objects.filter(day=day, given_back_at=None)
    return min(
        TABLES,
        key=lambda table: (
            taken.filter(table=table, view=view).count(), taken.filter(table=table).count()
        ),
    )


# ------------------------------------------------------------------------------- for all


def _run_of(context):
    return Run.objects.select_related('applicant').get(id=context.uid.rpartition(':')[2])


def _applicant_of(context):
    return Applicant.objects.get(id=context.uid.rpartition(':')[2])


def _summarize(context, lines):
    run, version = _run_of(context), context['completed']['version']
    with transaction.atomic():
        Summary.objects.get_or_create(run=run)
        Summary.objects.filter(run=run, version__lt=version).update(version=version, lines=lines)


def _tell(context, applicant, text):
    """Write a message. A task that runs again after a crash writes no second one."""
    Message.objects.get_or_create(
        key=f'{context.uid} {context.instance_name}',
        defaults={'applicant': applicant, 'text': text},
    )
