"""Hands released instances to their task runners, and sees to what goes wrong there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery._state import get_current_worker_task
from kombu.exceptions import OperationalError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import Release
from celery_triggers.publisher import Job, Publisher
from celery_triggers.registry import task_runners
from celery_triggers.runners import CeleryTaskRunner, EagerError, fail_dispatch
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
        self.publisher = Publisher(app)
        self._runners: dict[str, Any] = {}

    def runner(self, key: str) -> Any:
        """Return the task runner under a key, made when it is first asked for."""
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = task_runners.get(key, self.app)
        return runner

    def dispatch(self, releases: Sequence[Release]) -> int:
        """Hand released instances to their task runners; return how many were taken.

        A broker that is down leaves them scheduled, for the sweep; anything else that keeps
        one from being sent fails that instance and never what released it.

        Raises:
            Exception: The first that eager tasks raised; all of them have run.
        """
        messages: list[Release] = []
        errors: list[Exception] = []
        taken: list[Release] = []
        for release in releases:
            runner = self._runner_of(release)
            if runner is None:
                continue
            if isinstance(runner, CeleryTaskRunner) and not self.app.conf.task_always_eager:
                messages.append(release)
                continue
            try:
                if self._run(runner, release):
                    taken.append(release)
            except EagerError as exc:
                errors.append(exc.error)
            except SoftTimeLimitExceeded as exc:
                errors.append(exc)
        handed_over = [r for r in taken if self._runner_of(r).hands_over]
        if handed_over and not self.app.conf.task_always_eager:
            self._confirm(handed_over)
        sent = self._publish(messages) if messages else 0
        if errors:
            raise errors[0] from errors[0].__cause__
        return len(taken) + sent

    def _runner_of(self, release: Release) -> Any:
        key = (
            release.config.using
            or release.manager.default_task_runner_name
            or self.settings.runner
        )
        try:
            return self.runner(key)
        except Exception as exc:  # noqa: BLE001
            # Its extra is not installed here, say: this instance's failure alone.
            _give_up(release, exc)
            return None

    def _run(self, runner: Any, release: Release) -> bool:
        """Let a runner see to an instance here and now; tell whether it has."""
        try:
            runner.run(release)
        except EagerError:
            raise
        except SoftTimeLimitExceeded:
            # It is meant for the code that fires; what was released is run all the same.
            runner.run(release)
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
        else:
            return True
        return False

    # ---------------------------------------------------------------- messages

    def _publish(self, releases: Sequence[Release]) -> int:
        lineage = _lineage(self.app)
        failures: dict[int, Exception] = {}
        messages: list[Callable[[Any, dict[str, Any]], None]] = [
            partial(self._send, replace(release, lineage=lineage), index, failures)
            for index, release in enumerate(releases)
        ]

        def confirm(sent: list[int]) -> None:
            self._confirm([releases[index] for index in sent if index not in failures])

        sent = self.publisher.publish(Job(messages, confirm))
        for index, exc in list(failures.items()):
            _give_up(releases[index], exc)
        return len([index for index in sent if index not in failures])

    def _send(
        self,
        release: Release,
        index: int,
        failures: dict[int, Exception],
        producer: Any,
        options: dict[str, Any],
    ) -> None:
        """Send one message; note what is wrong with it alone, raise what the broker says."""
        runner = self._runner_of(release)
        try:
            runner.send(release, producer=producer, **options)
        except RecursionError as exc:
            failures[index] = exc
        except Exception as exc:
            connection = producer.connection
            down = (*_NOT_SENT, *connection.connection_errors, *connection.channel_errors)
            if isinstance(exc, down):
                raise
            # Whatever is wrong with one task is that instance's failure alone.
            failures[index] = exc

    def _confirm(self, releases: Sequence[Release]) -> None:
        """Note that messages were sent, unless their instances run already."""
        writes = [(release.manager.storage, release.confirm_write()) for release in releases]
        if not writes:
            return
        storage = type(writes[0][0])
        for answer in storage.write_many(writes):
            if isinstance(answer, StorageUnavailable):
                logger.warning('messages were sent and may be sent again: %s', answer)
                return


def _lineage(app: Any) -> dict[str, Any]:
    """Return what Celery would add to a message that this thread's task sends."""
    lineage: dict[str, Any] = {'reply_to': app.thread_oid}
    task: Any = get_current_worker_task()
    if task is not None:
        request = task.request
        lineage['root_id'] = request.root_id or request.id
        lineage['parent_id'] = request.id
        if app.conf.task_inherit_parent_priority:
            lineage['priority'] = (request.delivery_info or {}).get('priority')
    return lineage


def _give_up(release: Release, exc: Exception) -> None:
    name, uid = release.instance.name, release.manager.uid
    logger.error('%s of session %r cannot be dispatched: %s', name, uid, exc)
    try:
        fail_dispatch(release, exc)
    except StorageUnavailable as down:
        # Not the caller's: what was fired is committed, and this is another change.
        logger.error('%s of session %r stays scheduled: %s', name, uid, down)
