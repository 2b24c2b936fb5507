"""What ``celery -A integration_worker worker`` loads."""

from __future__ import annotations

from typing import Any

import integration_app
from billiard.pool import ApplyResult
from celery.signals import task_failure

app = integration_app.from_environment()
app.set_current()
integration_app.declare_only_in_the_worker(app)


@task_failure.connect(weak=False)
def _count(sender: Any = None, task_id: str = '', **_: Any) -> None:
    integration_app.note(f'task_failure {task_id}', 'signal')


_read_acknowledgement = ApplyResult._ack
_overlooked: set[str] = set()


def _acknowledge(self: Any, *args: Any) -> Any:
    """Overlook the first word that a child has begun an instance of ``t_unnoticed...``.

    A parent that sees several children die at once looks for the requests of those that
    died last before it reads what they wrote.
    """
    request = getattr(self._accept_callback, '__self__', None)
    header = getattr(request, 'request_dict', {}).get('triggers') or {}
    task_id = str(header.get('task_id'))
    if str(header.get('instance')).startswith('t_unnoticed') and task_id not in _overlooked:
        _overlooked.add(task_id)
        return None
    return _read_acknowledgement(self, *args)


ApplyResult._ack = _acknowledge
