"""One change of a session, decided as a whole: firings, outcomes, what people do.

A step works on a :class:`~celery_triggers.engine.session.Session` slice and notes what
it touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from celery_triggers.engine.configuration import Configuration, TaskConfig
from celery_triggers.engine.finalizing import waits_for_the_end
from celery_triggers.engine.firing_step import CASCADE_LIMIT, FiringStep, passes
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import AGAIN, Instance, merged
from celery_triggers.engine.session import FiringRecord, Latest, NotLoaded, Plan
from celery_triggers.engine.transitions import BY_HAND, UNHAPPY, Event, Status, next_status
from celery_triggers.exceptions import InvalidConfiguration, InvalidTransition

#: The reason of a failure whose worker is gone.
WORKER_LOST = 'worker lost'

#: The reason of a failure at a time limit.
TIME_LIMIT = 'time limit'

#: For how many seconds an attempt waits at most that has lost several workers.
MOST_WAIT = 60

#: Reasons of a failure after which a success may still arrive and count.
LOST = frozenset({WORKER_LOST, TIME_LIMIT})


class Step(FiringStep):
    """One atomic change of a session."""

    # ---------------------------------------------------------------- outcomes

    def finish(
        self, instance: Instance, result: Any, cascade: dict[str, Any], *, untold: bool = False
    ) -> None:
        """End an instance with success; its task's name is fired with ``cascade``.

        Args:
            untold: Whether all that is known is the stored result. Celery stores it before it
                counts the task as a part of its chord, which may have been cut off.
        """
        late = (
            instance.status is Status.FAILED and instance.metadata.get('reason') in LOST
        )
        stopped = self._too_deep(instance, instance.task)
        if stopped and not late:
            self._advance(instance, Event.FAIL)
            self._unclaim(instance)
            instance.metadata['reason'] = CASCADE_LIMIT
            instance.metadata['exception'] = {'type': 'CascadeLimitExceeded', 'message': stopped}
            # For a person who carries it on, with skip_failed_instance(..., cascade=True).
            instance.metadata['result'] = result
            return
        self._advance(instance, Event.LATE_SUCCESS if late else Event.FINISH)
        self._unclaim(instance)
        instance.metadata['result'] = result
        if untold:
            self._tell_chord(instance)
        self._fire_end(instance, instance.task, cascade)
        self.settle()

    def _tell_chord(self, instance: Instance) -> None:
        """Have a gated task counted as a part of its chord, if it is in one.

        Whoever died may have Celery's claim to hand the body on, and then nobody else can
        until that is over.
        """
        if instance.gate is not None and instance.gate.in_chord:
            self._end_gate(instance, self.now + self.limits.chord_patience, at_once=False)

    def fail(
        self,
        instance: Instance,
        reason: str,
        exception: Mapping[str, Any],
        *,
        untold: bool = False,
    ) -> None:
        """End an instance with a failure.

        Args:
            reason: What kind of failure it was, in a few words.
            exception: ``{"type", "message", "traceback", "context"}``.
            untold: Whether Celery knows nothing of it, so that it has told nobody who waits
                for the result.
        """
        self._advance(instance, Event.FAIL)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        instance.metadata['exception'] = dict(exception)
        if untold:
            self._tell_end(None, instance)
        facts = {key: exception[key] for key in ('type', 'message') if key in exception}
        self._fire_outcome(instance, 'failed', {'reason': reason, **facts})
        self.settle()

    def revoke(self, instance: Instance, reason: str, *, untold: bool = False) -> None:
        """End an instance as revoked.

        Args:
            untold: As for :meth:`finish`.
        """
        waited = instance.status is Status.UNSTARTED
        self._advance(instance, Event.REVOKE)
        self._unclaim(instance)
        instance.metadata['reason'] = reason
        if waited:
            self._tell_end(None, instance)
        elif untold:
            self._tell_chord(instance)
        self._fire_outcome(instance, 'revoked', {'reason': reason})
        self.settle()

    def retry(
        self,
        instance: Instance,
        eta: int,
        message: Mapping[str, Any] | None = None,
        *,
        send: bool = True,
    ) -> None:
        """Give a running instance another attempt.

        Args:
            eta: Before when it must not run, in milliseconds; 0: at once.
            message: What its message has, see :class:`Instance`.
            send: Whether it is to be sent; else whoever retries it runs it.
        """
        self._advance(instance, Event.RETRY)
        self._unclaim(instance)
        instance.attempt += 1
        instance.sends, instance.eta, instance.lost = 0, eta, []
        instance.message = dict(message or {})
        self._schedule(instance, send=send)

    def requeue(self, instance: Instance, *, send: bool = False) -> None:
        """Give a running instance's attempt back, as if it had not been claimed.

        Args:
            send: Whether its message is gone and has to be sent again.
        """
        self._advance(instance, Event.REQUEUE)
        self._unclaim(instance)
        instance.sends, instance.eta = 0, 0
        self._schedule(instance, send=send)

    def lose(
        self, instance: Instance, exception: Mapping[str, Any], *, untold: bool = False
    ) -> None:
        """Take an instance back from a worker that is gone.

        What its claim said becomes of it: it is run again, for so long as fewer workers
        than ``max_deliveries`` were lost with the attempt, replayed, or failed. One that
        had not been claimed is sent again, since its code has not started.

        Args:
            exception, untold: As for :meth:`fail`.
        """
        next_status(instance.name, instance.status, Event.FAIL)
        known = self.session.config_of(instance) is not None
        most = self.limits.max_deliveries
        if instance.status is Status.SCHEDULED and instance.sends < most:
            self.resend(instance)
        elif instance.policy == AGAIN and max(len(instance.lost) + 1, instance.sends) < most:
            self._advance(instance, Event.REQUEUE)
            # What has killed several workers lets others live for a while.
            wait = min(2 ** len(instance.lost), MOST_WAIT) * 1000 if instance.lost else 0
            instance.lost = [*instance.lost, instance.token]
            self._unclaim(instance)
            instance.eta = self.now + wait if wait else 0
            self._schedule(instance)
            self.settle()
        elif instance.replays_when_lost and known:
            facts = {'reason': WORKER_LOST, 'exception': dict(exception)}
            self.replay(instance, metadata=facts)
        else:
            self.fail(instance, WORKER_LOST, exception, untold=untold)

    def resend(self, instance: Instance) -> None:
        """Send a scheduled instance again, whose message is gone."""
        self.touch(instance)
        self._schedule(instance)

    @staticmethod
    def _unclaim(instance: Instance) -> None:
        instance.token, instance.lease, instance.spared = '', 0, 0

    def skip(
        self,
        instance: Instance,
        *,
        metadata: Mapping[str, Any] | None = None,
        cascade: dict[str, Any] | None = None,
        untold: bool = False,
    ) -> None:
        """End an instance as skipped; ``cascade`` fires its task's name with these kwargs.

        Args:
            untold: Whether Celery has told nobody that it ended.
        """
        self._advance(instance, Event.SKIP)
        self.skipped.append((instance.name, cascade is not None))
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        if untold:
            self._tell_end(None, instance)
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        self.settle()

    def replay(
        self,
        instance: Instance,
        *,
        replacement_kwargs: Mapping[str, dict[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        eta: int = 0,
    ) -> Instance:
        """Release a new instance in the place of this one; ``unless`` is not asked again."""
        self._advance(instance, Event.REPLAY)
        self._unclaim(instance)
        instance.metadata.update(metadata or {})
        new = self.clone(instance)
        new.received.update(replacement_kwargs or {})
        new.eta = eta
        task = self.session.config_of(instance)
        if task is None:
            raise InvalidTransition(
                f'{instance.name} cannot be replayed: the session no longer has the '
                f'trigger task {instance.task!r}',
                instance=instance.name,
                status=instance.status.value,
                wanted=Event.REPLAY.value,
            )
        self.replayed.append(new.name)
        self._release(task, new)
        self.settle()
        return new

    def create(self, task: TaskConfig) -> Instance:
        """Make a task's next instance by hand: it receives the latest firings and is judged.

        The whole session must be loaded.
        """
        instance = self._create(task, None)
        self._judge(task, instance)
        self.settle()
        return instance

    def wait_at_gate(
        self, name: str, task_id: str, gate: Gate, *, until: int = 0, fresh: bool = False
    ) -> Instance:
        """Make the instance of a gate and judge it.

        Where its condition has filters the whole session must be loaded.

        Args:
            until: Its deadline, in milliseconds; 0: none but what ``within`` says.
            fresh: Whether only what is fired from now on counts.
        """
        task = gate.config(name)
        gate.aside = gate.template or waits_for_the_end(self.session.configuration, task)
        instance = self._next_instance(name, gate, task_id)
        instance.until = until
        self._filter_past({
            trigger: {leaf.where for leaf in task.leaves_of(trigger) if leaf.where is not None}
            for trigger in task.triggers
        })
        if fresh:
            for leaf in task.counters:
                known = self._known(leaf)
                gate.since[leaf.key] = known.count if known is not None else 0
        else:
            self._receive_past(task, instance)
        self._wait(task, instance)
        self._judge(task, instance)
        self.settle()
        return instance

    def start(self, until: Mapping[str, int]) -> None:
        """Let deadlines count from now, if no firing has begun the session.

        Args:
            until: Deadlines of this session's own, in milliseconds, by trigger task: of
                what waits for its release now. The whole session must be loaded for them.
        """
        self.begin()
        head = self.session.head
        if not head.has_begun:
            head.begun = self.now
            self.changed = True
        for name, deadline in sorted(until.items()):
            task = self.session.configuration[name]
            waiting = [i for i in self._unstarted() if i.task == name]
            if not self.session.counts_of(name).total:
                waiting = [self._create(task, None)]
            for instance in waiting:
                instance.until = deadline
                self.touch(instance)
                self._wait(task, instance)
                self._judge(task, instance)
        self.settle()

    def expire(self, instance: Instance) -> bool:
        """End a waiting instance whose deadline has passed; tell whether it has."""
        task = self.session.config_of(instance)
        if not 0 < instance.deadline(task) <= self.now:
            return False
        self._expire(task, instance)
        self.settle()
        return True

    def copy(self, task: TaskConfig, instance: Instance) -> Instance:
        """Make another instance with what this one received, and judge it.

        The whole session must be loaded.
        """
        new = self.clone(instance)
        self._wait(task, new)
        self._judge(task, new)
        self.settle()
        return new

    def set_status(
        self,
        instance: Instance,
        status: Status,
        *,
        metadata: Mapping[str, Any] | None = None,
        cascade: dict[str, Any] | None = None,
    ) -> None:
        """Set a status by hand, as far as the table lets a person do so."""
        if instance.status not in BY_HAND.get(status, ()):
            raise InvalidTransition(
                f'{instance.name} is {instance.status}; it cannot be set to {status} by hand',
                instance=instance.name,
                status=instance.status.value,
                wanted=status.value,
            )
        before = instance.status
        instance.move(status, self.now)
        self._unclaim(instance)
        if status in (Status.ABANDONED, Status.FAILED, Status.REVOKED):
            instance.metadata['reason'] = 'by hand'
        instance.metadata.update(metadata or {})
        self._recount(instance, before)
        if before not in UNHAPPY:
            # What failed or was revoked has told that it did.
            self._tell_end(self.session.config_of(instance), instance)
        if cascade is not None:
            self._fire_by_hand(instance, cascade)
        if status in UNHAPPY:
            self._fire_outcome(instance, status.value, {'reason': 'by hand'})
        elif status is Status.ABANDONED and before is Status.UNSTARTED:
            task = self.session.config_of(instance)
            self._fire_abandoned(task, instance, 'by hand')
        self.settle()

    def _fire_by_hand(self, instance: Instance, cascade: dict[str, Any]) -> None:
        """Fire a task's name because a person says so, which is the way out of a limit."""
        self._enqueue(
            FiringRecord(0, instance.task, cascade, self.now, None, instance.name)
        )

    # ----------------------------------------------------------- configuration

    def reconfigure(
        self, configuration: Configuration, *, apply_past: bool, named: Collection[str] = ()
    ) -> None:
        """Change the session's configuration and look again at what waits.

        The whole session must be loaded.

        Args:
            apply_past: Whether past firings reach what waits, and the tasks in ``named``
                that have no instance.
        """
        old = self.session.configuration
        for name in sorted({i.task for i in self.session.instances.values() if i.gate}):
            if name in configuration and name not in old:
                raise InvalidConfiguration(
                    'a gate of this session has this name; give the trigger task another',
                    task=name,
                )
        self.session.configuration = self.new_configuration = configuration
        self.session.head.digest = configuration.digest
        self.changed = True
        self._filter_past({
            trigger: configuration.filters(trigger) for trigger in self.session.latest
        })
        for instance in self._unstarted():
            if instance.gate is not None:
                # It brings its own.
                continue
            task = configuration.get(instance.task)
            if instance.deadline(old.get(instance.task)):
                self.dues[instance.name] = 0
            if task is None:
                self._set_waits(instance, set())
                self._abandon(old.get(instance.task), instance, 'removed')
                continue
            if apply_past:
                self._receive_past(task, instance)
            self.touch(instance)
            self._wait(task, instance)
            self._judge(task, instance)
        if apply_past:
            self._create_from_past(named)
        if self.session.head.has_begun:
            # Those that came with this change count from now.
            self._create_with_deadline()
        self.settle()

    def _filter_past(self, filters: Mapping[str, Collection[str]]) -> None:
        """Ask filters that are new about the firings that the history holds.

        Args:
            filters: By trigger.
        """
        new: dict[str, list[str]] = {}
        for trigger in sorted(filters):
            latest = self.session.latest.get(trigger)
            known = latest.matches if latest is not None else {}
            new[trigger] = sorted(set(filters[trigger]).difference(known))
            if new[trigger]:
                if not self.session.plan.whole:
                    raise NotLoaded(Plan(whole=True))
                latest = self.session.latest.setdefault(trigger, Latest(0, {}))
                latest.matches.update((where, Latest(0, {})) for where in new[trigger])
                self.fired.add(trigger)
        for firing in self.session.history:
            for where in new.get(firing.trigger, ()):
                if passes(firing, where):
                    self.session.latest[firing.trigger].count_match(where, firing.kwargs)

    def _create_from_past(self, names: Collection[str]) -> None:
        """Make the instances that these trigger tasks would have had from past firings."""
        for name in sorted(names):
            task = self.session.configuration[name]
            if self.session.counts_of(name).total:
                continue
            payloads = [r for r in self.session.history if r.trigger == task.and_every]
            for firing in payloads:
                self._judge(task, self._create(task, firing))
            known = [self.session.latest_of(trigger) for trigger in task.triggers]
            if not payloads and any(latest and latest.count for latest in known):
                self._judge(task, self._create(task, None))

    def cancel(self, reason: str) -> None:
        """Abandon what waits, now and later; the whole session must be loaded."""
        self.session.head.cancelled = reason
        self.changed = True
        for instance in self._unstarted():
            task = self.session.config_of(instance)
            self._abandon(task, instance, f'cancelled: {reason}')
        self.settle()


def cascade_kwargs(result: Any) -> dict[str, Any]:
    """Return the kwargs of a cascade: a mapping as it is, other results wrapped."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return merged({}, result)
    return {'result': result}
