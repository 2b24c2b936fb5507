"""What is stored: what people answered, and what the trigger tasks made of it."""

import uuid

from django.db import models

from examples.django_questionnaire.questionnaires.forms import QUESTIONNAIRES, Agreement


class Respondent(models.Model):
    """One of the 944 people of 1996 with whom answers are compared: the demo's content."""

    number = models.IntegerField(unique=True)
    age = models.IntegerField()
    educ = models.IntegerField()
    popul = models.IntegerField(help_text='people in the place where they live, in thousands')
    tv_news = models.IntegerField(help_text='days a week')
    place = models.IntegerField(help_text='1: extremely liberal, 7: extremely conservative')
    party = models.IntegerField(help_text='0: strong Democrat, 6: strong Republican')
    vote = models.IntegerField(help_text='0: Clinton, 1: Dole')


class Applicant(models.Model):
    """Somebody who would like to sit in the panel. Who knows the id may see and change it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    created_at = models.DateTimeField(auto_now_add=True)

    @property
    def uid(self):
        """The session to which both questionnaires report."""
        return f'applicant:{self.id}'


class Run(models.Model):
    """An applicant's run through one of the questionnaires."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    applicant = models.ForeignKey(Applicant, models.CASCADE, related_name='runs')
    questionnaire = models.CharField(max_length=20)
    started_at = models.DateTimeField(auto_now_add=True)
    sent_version = models.IntegerField(default=0, help_text='0: not sent')
    sent_at = models.DateTimeField(null=True)
    withdrawn_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=['applicant', 'questionnaire'], name='one_run_for_each_questionnaire'
            )
        ]

    @property
    def uid(self):
        """The run's own session."""
        return f'questionnaire:{self.questionnaire}:{self.id}'

    @property
    def shape(self):
        """The questionnaire itself: its title and its pages."""
        return QUESTIONNAIRES[self.questionnaire]

    @property
    def version(self):
        """Counts every change of every page."""
        return sum(page.revision for page in self.pages.all())

    @property
    def first_missing(self):
        """The number of the first page that was not saved, or ``None``."""
        saved = {page.number for page in self.pages.all()}
        numbers = range(1, len(self.shape.forms) + 1)
        return next((number for number in numbers if number not in saved), None)


class Page(models.Model):
    """A page as it was saved last."""

    run = models.ForeignKey(Run, models.CASCADE, related_name='pages')
    number = models.IntegerField()
    revision = models.IntegerField(default=0, help_text='how often it was saved anew')
    answers = models.JSONField()
    saved_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ['number']
        constraints = [models.UniqueConstraint(fields=['run', 'number'], name='one_of_each_page')]


class Comparison(models.Model):
    """How the answers of a page compare with those of the respondents."""

    run = models.ForeignKey(Run, models.CASCADE, related_name='comparisons')
    number = models.IntegerField()
    revision = models.IntegerField(default=0, help_text='which revision of the page it is about')
    lines = models.JSONField(default=list)

    class Meta:
        ordering = ['number']
        constraints = [
            models.UniqueConstraint(fields=['run', 'number'], name='one_comparison_of_each_page')
        ]


class Summary(models.Model):
    """What is told to somebody who has sent a questionnaire."""

    run = models.OneToOneField(Run, models.CASCADE, related_name='summary')
    version = models.IntegerField(default=0, help_text='which version of the run it is about')
    lines = models.JSONField(default=list)


class Seat(models.Model):
    """An applicant's seat at a table of the panel."""

    applicant = models.OneToOneField(Applicant, models.CASCADE, related_name='seat')
    day = models.CharField(max_length=20)
    table = models.CharField(max_length=20)
    view = models.CharField(max_length=20)
    given_at = models.DateTimeField(auto_now_add=True)
    given_back_at = models.DateTimeField(null=True)

    def __str__(self):
        day = dict(Agreement.base_fields['day'].choices)[self.day]
        return f'table {self.table}, {day}'


class Message(models.Model):
    """A message to an applicant. Its key keeps a task that runs again from sending another."""

    key = models.CharField(max_length=200, unique=True)
    applicant = models.ForeignKey(Applicant, models.CASCADE, related_name='messages')
    text = models.TextField()
    sent_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ['id']


class TimelineEntry(models.Model):
    """What a trigger manager noted of a firing; see ``managers.py``."""

    uid = models.CharField(max_length=100, db_index=True)
    trigger = models.CharField(max_length=100)
    started = models.CharField(max_length=500)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ['id']
