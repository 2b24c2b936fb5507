"""What people do from the command line: ``celery -A <app> triggers ...``.

May import everything below it, late: Celery loads this room for every ``celery`` command.
"""

from celery_triggers.cli.commands import triggers

__all__ = ['triggers']
