"""The Celery application, as a Django project has it."""

import os

from celery import Celery

os.environ.setdefault('DJANGO_SETTINGS_MODULE', 'examples.django_questionnaire.settings')

app = Celery('questionnaires')
app.config_from_object('django.conf:settings', namespace='CELERY')
app.autodiscover_tasks()
