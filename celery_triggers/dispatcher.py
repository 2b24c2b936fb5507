"""Hands released instances to their task runners, and sees to what goes wrong there."""

from __future__ import annotations

import logging
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import Release
from celery_triggers.registry import task_runners
from celery_triggers.runners import EagerError, fail_dispatch
from celery_triggers.settings import Settings

__all__ = ['Dispatcher']

logger = logging.getLogger(__name__)

#: What a broker or a result backend that is down raises, or a transport that is not
#: installed; the instance stays scheduled.
_NOT_SENT = (OperationalError, OSError, RuntimeError, ImportError)


class Dispatcher:
    """Dispatches the released instances of one application.

    Args:
        app: The Celery application.
        settings: Its settings.
    """

    def __init__(self, app: Any, settings: Settings):
        self.app = app
        self.settings = settings
        self._runners: dict[str, Any] = {}

    def runner(self, key: str) -> Any:
        """Return the task runner under a key, made when it is first asked for."""
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = task_runners.get(key, self.app)
        return runner

    def dispatch(self, release: Release) -> None:
        """Hand a released instance to its task runner.

        A broker that is down leaves the instance scheduled; anything else that keeps it
        from being sent fails the instance and never what released it.
        """
        key = (
            release.config.using
            or release.manager.default_task_runner_name
            or self.settings.runner
        )
        try:
            self.runner(key).run(release)
        except EagerError as exc:
            raise exc.error from exc.error.__cause__
        except SoftTimeLimitExceeded:
            # It is meant for the code that fires; what was released is sent all the same.
            self.runner(key).run(release)
            raise
        except RecursionError as exc:
            _give_up(release, exc)
        except _NOT_SENT as exc:
            logger.error(
                '%s of session %r stays scheduled, its message was not sent: %s',
                release.instance.name, release.manager.uid, exc,
            )
        except Exception as exc:  # noqa: BLE001
            # Whatever is wrong with one task is that instance's failure alone.
            _give_up(release, exc)


def _give_up(release: Release, exc: Exception) -> None:
    name, uid = release.instance.name, release.manager.uid
    logger.error('%s of session %r cannot be dispatched: %s', name, uid, exc)
    try:
        fail_dispatch(release, exc)
    except StorageUnavailable as down:
        # Not the caller's: what was fired is committed, and this is another change.
        logger.error('%s of session %r stays scheduled: %s', name, uid, down)
