"""What runs in a worker beside its tasks: leases are renewed, losses reported, sessions swept.

May import what is sent, what people write and the sweep, and what lies below these; never
``app``, which makes it known to Celery.
"""

from celery_triggers.worker.bootstep import SweeperStep
from celery_triggers.worker.heart import beat_while
from celery_triggers.worker.result_backend import StoredOutcomes

__all__ = ['StoredOutcomes', 'SweeperStep', 'beat_while']
