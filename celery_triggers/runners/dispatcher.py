"""Hands released instances to their task runners, and sees to what goes wrong there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import Release
from celery_triggers.registry import task_runners
from celery_triggers.runners.broker_thread import Job, Publisher, Wire
from celery_triggers.runners.runners import CeleryTaskRunner, EagerError, fail_dispatch
from celery_triggers.settings import Settings
from celery_triggers.storages.records import Write

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
        eager = self.app.conf.task_always_eager
        messages: list[tuple[Release, CeleryTaskRunner]] = []
        errors: list[Exception] = []
        handed_over: list[Release] = []
        taken = 0
        for release in releases:
            runner = self._runner_of(release)
            if runner is None:
                continue
            if isinstance(runner, CeleryTaskRunner) and not eager:
                messages.append((release, runner))
                continue
            try:
                if _guarded(release, partial(runner.run, release)):
                    taken += 1
                    if runner.hands_over and not eager:
                        handed_over.append(release)
            except EagerError as exc:
                errors.append(exc.error)
            except SoftTimeLimitExceeded as exc:
                errors.append(exc)
        if handed_over:
            _note([(release, release.confirm_write()) for release in handed_over])
        sent = self._publish(messages) if messages else 0
        if errors:
            raise errors[0] from errors[0].__cause__
        return taken + sent

    def _runner_of(self, release: Release) -> Any:
        key = (
            release.config.using
            or release.manager.default_task_runner_name
            or self.settings.runner
        )
        try:
            runner = self.runner(key)
            if (release.ends or release.header.get('gate')) and runner.hands_over:
                # What Celery made of it is told to Celery.
                return self.runner('celery')
            return runner
        except Exception as exc:  # noqa: BLE001
            # Its extra is not installed here, say: this instance's failure alone.
            _give_up(release, exc)
            return None

    # ---------------------------------------------------------------- messages

    def _publish(self, messages: Sequence[tuple[Release, CeleryTaskRunner]]) -> int:
        if self.publisher.paused:
            # Nobody is told of a message that is not sent.
            return 0
        made: list[Release] = []
        wires: list[Wire] = []
        for release, runner in messages:
            wire = self._message(release, runner)
            # An apply_async of one's own may have put it off. Then it is looked at later.
            if wire:
                made.append(release)
                wires.append(wire)

        def sent(positions: list[int]) -> None:
            _note([(made[i], made[i].confirm_write()) for i in positions])

        def refused(position: int, exc: Exception) -> None:
            release = made[position]
            logger.error(
                '%s of session %r stays scheduled, the broker does not take its message: %s: %s',
                release.instance.name, release.manager.uid, type(exc).__name__, exc,
            )
            _note([(release, release.refuse_write())])

        return len(self.publisher.publish(Job(wires, sent, refused))) if wires else 0

    def _message(self, release: Release, runner: CeleryTaskRunner) -> Wire | None:
        """Make the message of an instance; ``None`` if that went wrong."""
        with self.publisher.recording() as (options, wire):

            def make() -> None:
                # Perhaps for the second time, after a soft time limit struck in the first.
                wire.clear()
                runner.send(release, **options)

            return wire if _guarded(release, make) else None


def _guarded(release: Release, call: Callable[[], object]) -> bool:
    """Let a runner do something about an instance; tell whether it has."""
    try:
        call()
    except EagerError:
        raise
    except SoftTimeLimitExceeded:
        # It is meant for the code that fires; what was released is seen to all the same.
        call()
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


def _note(writes: Sequence[tuple[Release, Write]]) -> None:
    """Write what became of messages, all of sessions in one place."""
    pairs = [(release.manager.storage, write) for release, write in writes]
    for answer in type(pairs[0][0]).write_many(pairs):
        if isinstance(answer, StorageUnavailable):
            logger.warning('messages were sent and may be sent again: %s', answer)
            return


def _give_up(release: Release, exc: Exception) -> None:
    name, uid = release.instance.name, release.manager.uid
    if release.ends:
        logger.error('the end of %s of session %r cannot be told: %s', name, uid, exc)
        _note([(release, release.refuse_write())])
        return
    logger.error('%s of session %r cannot be dispatched: %s', name, uid, exc)
    try:
        fail_dispatch(release, exc)
    except StorageUnavailable as down:
        # Not the caller's: what was fired is committed, and this is another change.
        logger.error('%s of session %r stays scheduled: %s', name, uid, down)
