"""A trigger manager of the project's own: ``CELERY_TRIGGERS_MANAGER = 'timeline'``."""

from celery_triggers import TriggerManager
from celery_triggers.manager import trigger_managers
from examples.django_questionnaire.questionnaires.models import TimelineEntry


@trigger_managers.register('timeline')
class TimelineManager(TriggerManager):
    """Notes each firing for the people who look at a page.

    A hook is called at most once, after the commit: if its process dies in between, never. So
    it does what may be missed. What has to happen is done by trigger tasks.
    """

    def _post_fire(self, trigger_name, tasks_scheduled):
        TimelineEntry.objects.create(
            uid=self.uid,
            trigger=trigger_name,
            started=', '.join(instance.name for instance in tasks_scheduled),
        )
