"""What takes a task's place (``Task.replace``) carries its claim, and ends its instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.canvas import Signature, _chain
from celery.canvas import chord as _chord

from celery_triggers.engine.calls import GATE, SPOKEN
from celery_triggers.manager.delivery import Delivery

__all__ = ['hand_over']


def hand_over(
    app: Any, sig: Signature, delivery: Delivery, header: Mapping[str, Any]
) -> None:
    """Hand the claim of a delivery over to a signature, whose outcome counts for the instance.

    Raises:
        StorageUnavailable: The storage did not answer.
    """
    delivery.hand_over(waits=_has_gate(sig))
    carried = {**header, 'claim': delivery.token}
    tasks = app.tasks
    failed = tasks['celery_triggers.replacement_failed'].s(header=carried)
    if isinstance(sig, _chord):
        # A header that fails calls the body's error callbacks.
        sig.body.link_error(failed)
    elif isinstance(sig, _chain):
        sig.link_error(failed)
    for final in _finals(sig):
        if final.subtask_type == GATE:
            # Its message has the header of its own instance, and this one's id.
            spoken = final.options[SPOKEN]
            final.options[SPOKEN] = {**spoken, 'place': header['instance']}
            final.link(tasks['celery_triggers.replacement_finished'].s(header=carried))
            final.link_error(failed)
            continue
        final.options['headers'] = {
            **(final.options.get('headers') or {}), 'triggers': carried,
        }


def _finals(sig: Any) -> list[Any]:
    """Return the signatures whose result is that of the whole, copies included."""
    if isinstance(sig, _chord):
        return _finals(sig.body)
    if isinstance(sig, _chain):
        # A frozen chain runs copies of its tasks, which stand in reverse order.
        frozen: Any = getattr(sig, '_frozen', None)
        last = [*sig.tasks[-1:], *(frozen[0][:1] if frozen else ())]
        return [final for task in last for final in _finals(task)]
    return [sig]


def _has_gate(value: Any) -> bool:
    """Tell whether there is a gate in a canvas, so that it may take any time."""
    if isinstance(value, Mapping):
        return value.get('subtask_type') == GATE or any(map(_has_gate, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_gate, value))
