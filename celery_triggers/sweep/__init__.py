"""What is overdue: a pass over the due dates, and what is done about one instance.

May import ``manager`` and what lies below it; it knows no Celery.
"""

from celery_triggers.sweep.sweep import Sweep, SweepReport

__all__ = ['Sweep', 'SweepReport']
