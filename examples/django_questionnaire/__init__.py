"""A citizens' panel in Django: two questionnaires, and an applicant who fills in both."""

from examples.django_questionnaire.celery import app

__all__ = ['app']
