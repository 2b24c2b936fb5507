"""The application's configuration."""

from django.apps import AppConfig


class QuestionnairesConfig(AppConfig):
    """Registers the trigger manager in every process, web or worker."""

    name = 'examples.django_questionnaire.questionnaires'
    label = 'questionnaires'

    def ready(self):
        from examples.django_questionnaire.questionnaires import managers  # noqa: F401
