"""Puts ``app.triggers`` and ``app.trigger_task`` on every Celery application.

kombu loads this module wherever the package is installed, through the entry point group
``kombu.serializers``, before ``celery.app.base`` is imported. It stays tiny and must
never be able to break an import of kombu or celery: whatever goes wrong here is a
warning, and Celery works as if the package were not installed.
"""

import contextlib
import sys
import warnings
from typing import Any

#: What kombu registers for us: a name without an encoder and a decoder, so nothing.
serializer = (None, None, 'application/x-celery-triggers')


class _Lazy:
    """An attribute that imports what it stands for when it is first looked at."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, app: Any, owner: Any = None) -> Any:
        if app is None:
            return self
        from celery_triggers.app import triggers_of

        return getattr(triggers_of(app), self.name) if self.name else triggers_of(app)


class _LazyGate:
    """Stands for the class of gates until a signature of that type is met."""

    @staticmethod
    def from_dict(signature: Any, app: Any = None) -> Any:
        from celery_triggers.canvas import Gate

        return Gate.from_dict(signature, app=app)


def _gate(self: Any, **conditions: Any) -> Any:
    """As :func:`celery_triggers.gate` with this signature."""
    from celery_triggers.canvas import gate

    return gate(self, **conditions)


def install_in_canvas(module: Any) -> None:
    """Make gates known to Celery's signatures, also where nobody imports this package.

    A worker that met a type of signature which it does not know would fail the task before it.
    """
    signature = getattr(module, 'Signature', None)
    if signature is not None and not hasattr(signature, 'gate'):
        signature.TYPES.setdefault('celery_triggers.gate', _LazyGate)
        signature.gate = _gate


def install(module: Any) -> None:
    """Put the attributes on ``Celery`` once ``celery.app.base`` has been imported."""
    celery = getattr(module, 'Celery', None)
    if celery is not None and 'triggers' not in vars(celery):
        celery.triggers = _Lazy('')
        celery.trigger_task = _Lazy('trigger_task')
        # Not by a hook of their own: with ``--pool solo`` it is the import of the signals that
        # makes kombu load this module.
        module.signals.celeryd_init.connect(
            _celeryd_init, weak=False, dispatch_uid='celery_triggers'
        )
    install_in_canvas(sys.modules.get('celery.canvas'))


def _celeryd_init(instance: Any = None, **_: Any) -> None:
    """Wake an application up in a worker if it has to do with triggers."""
    app = getattr(instance, 'app', None)
    if app is not None:
        from celery_triggers.app import wake_in_worker

        install_in_canvas(sys.modules.get('celery.canvas'))
        wake_in_worker(app)


def _register() -> None:
    import wrapt

    for name, hook in (('celery.app.base', install), ('celery.canvas', install_in_canvas)):
        # An import that is under way already would call the hook on half a module.
        spec = getattr(sys.modules.get(name), '__spec__', None)
        if not getattr(spec, '_initializing', False):
            wrapt.register_post_import_hook(hook, name)


try:
    _register()
except Exception as exc:  # noqa: BLE001  (the promise above: never break an import)
    with contextlib.suppress(Exception):  # warnings may be errors
        warnings.warn(f'celery_triggers could not attach itself to Celery: {exc!r}', stacklevel=1)
