"""What really happened, and what must be true at every moment.

The ledger sees every change of a row at the moment of its commit, knows who made it, and
knows which code really ran. It knows nothing of what the product believes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery_triggers.engine.calls import END
from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.step import LOST
from celery_triggers.engine.transitions import BY_HAND, TRANSITIONS
from celery_triggers.storages.document.document import Document
from celery_triggers.storages.records import Commit, Row, Taken, Write
from tests.simulation.facts import (
    NOBODY,
    Actor,
    Execution,
    FiringFact,
    Move,
    Record,
    SessionFacts,
)
from tests.simulation.gates import GateLedger, brought_by
from tests.simulation.world import World

#: Every step that the table allows, by name of the statuses.
STEPS = {
    (before.value, after.value) for table in TRANSITIONS.values() for before, after in table.items()
} | {(before.value, after.value) for after, befores in BY_HAND.items() for before in befores}

#: Faults after which a message may be missing though it was sent and confirmed.
LOSING = frozenset({
    'message lost', 'broker forgets', 'kill process', 'kill host', 'kill parent', 'cold restart',
    'stop process', 'stop host', 'outage', 'storage error', 'answer lost', 'message late',
    'message revoked', 'message expired', 'jump back', 'jump ahead', 'publishing fails',
    'publishing hangs', 'confirmation lost', 'broker down', 'message refused',
})

#: The setting ``triggers_max_deliveries`` of every run.
MOST_DELIVERIES = 4

#: Within how many milliseconds a healthy world sees to what is due: two sweeps and a bit,
#: and what a sweep waits at most for a publisher that hangs.
MOST_LATE = 4500

ALIVE = ('scheduled', 'running')


@lru_cache(maxsize=64)
def _configuration(text: str) -> Configuration:
    return Configuration.from_text(text)


class Ledger:
    """Notes everything, and breaks off a run when a promise is broken.

    Attributes:
        leases: Until when each token's lease holds, by the storage's clock.
        claims: When each token was last granted its claim.
        given_up: Who took an instance from a token that had it.
        runs: Which Celery task an instance was last sent as, by uid and name.
        gates: What there is to say of gates alone.
    """

    def __init__(self, world: World):
        self.world = world
        self.firings: list[FiringFact] = []
        self.sessions: dict[str, SessionFacts] = {}
        self.executions: list[Execution] = []
        self.starts: Counter[tuple[str, str, int]] = Counter()
        self.rejected: Counter[tuple[str, str, int]] = Counter()
        self.leases: dict[str, int] = {}
        self.claims: dict[str, int] = {}
        self.given_up: dict[str, str] = {}
        self.runs: dict[tuple[str, str], str] = {}
        self.gates = GateLedger(world, self)
        self.settings: Any = None
        self.storage_class: Any = None
        self.application: Any = None

    # -------------------------------------------------------------------- actors

    @contextmanager
    def acting(self, actor: Actor) -> Iterator[None]:
        """Whatever the running process changes now is this actor's doing."""
        process = self.world.current
        if process is None:
            yield
            return
        before = process.actor
        process.actor = actor
        try:
            yield
        finally:
            process.actor = before

    @property
    def actor(self) -> Actor:
        return getattr(self.world.current, 'actor', None) or NOBODY

    def broken(self, invariant: str, text: str) -> None:
        self.world.break_promise(invariant, text)

    # ------------------------------------------------------------------- changes

    def committed(self, storage: Any, commit: Commit, before: Mapping[str, Row | None]) -> None:
        """Look at a commit that was applied."""
        facts = self._facts(storage.uid, commit.incarnation)
        records = self._records(commit)
        clock = int(json.loads(commit.head)['t'])
        self._check_delayed(facts, commit, {record[2] for record in records}, clock)
        for trigger, _, event, cause in records:
            if event is not None:
                facts.events[event] += 1
                if facts.events[event] > 1:
                    self.broken('1 exactly once', f'event {event!r} was applied twice')
            self._cascade(facts, trigger, cause)
        facts.records += records
        actor = self.actor
        if actor.kind == 'context':
            self._check_run(storage, commit)
        rows = {name: (before[name], row) for name, row in commit.rows.items()}
        facts.moves.append(Move(actor, rows, records, clock))
        self.gates.committed(storage, commit.incarnation, rows, actor)
        dues = self._dues(storage.uid)
        for name, (old, new) in rows.items():
            self._check_step(storage.uid, name, old, new)
            self._check_right(storage.uid, commit.incarnation, name, old, new)
            self._check_due(storage.uid, name, new, dues)
            if old is not None and new.status == 'scheduled':
                deadline = self.deadline_of(storage.uid, name, old)
                if 0 < deadline <= clock:
                    late = clock - deadline
                    self.broken('7 deadline', f'{name} was released {late} ms too late')
        if self.world.trace is not None:
            changes = [
                f'{name} {old.status if old else "-"}->{new.status}/{new.attempt} {new.loss}'
                for name, (old, new) in rows.items()
            ]
            self.world.note(
                f'committed {storage.uid} [{actor.kind} {_short(actor.what)}] '
                f'{", ".join(changes)} fired {[record[0] for record in records]}'
            )

    def _check_delayed(
        self, facts: SessionFacts, commit: Commit, fired: set[str | None], clock: int
    ) -> None:
        """Look at firings that are put off, that come, and that are taken back."""
        for key, text in commit.puts.items():
            if key.startswith('d:'):
                facts.delayed[key[2:]] = json.loads(text)[2]
                self.world.happened['firing delayed'] += 1
        for event in fired & facts.delayed.keys():
            if facts.delayed[str(event)] > clock:
                self.broken('6 ETA', f'{event!r} was applied before its time')
            if event in facts.taken_back:
                self.broken('1 exactly once', f'{event!r} was taken back and applied')
        gone = {key[2:] for key in commit.drops if key.startswith('d:')}
        facts.taken_back |= gone - fired

    def _facts(self, uid: str, incarnation: str) -> SessionFacts:
        facts = self.sessions.get(incarnation)
        if facts is not None and facts.deleted:
            # A medium that repeats a session's first commit, deleted in between, makes
            # another session of it.
            self.sessions[f'{incarnation}, deleted'] = self.sessions.pop(incarnation)
            self.gates.deleted(incarnation)
            facts = None
        if facts is None:
            facts = self.sessions[incarnation] = SessionFacts(uid, incarnation)
        return facts

    def written(self, storage: Any, write: Write, old: Row, new: Row) -> None:
        """Look at a conditional write that was applied."""
        uid, name, actor = storage.uid, write.name, self.actor
        now = self.world.storage_time
        if old.loss == ENDING:
            self.gates.written(uid, self._incarnation(storage), name, old, new)
        elif new.status != old.status or new.token != old.token:
            self._check_claim(uid, name, old, new, now)
            facts = self.sessions[self._incarnation(storage)]
            facts.moves.append(Move(actor, {name: (old, new)}, []))
        if new.sends > MOST_DELIVERIES:
            self.broken('5 deliveries', f'{name} was sent {new.sends} times')
        if new.sends != old.sends and old.status != 'scheduled' and old.loss != ENDING:
            self.broken('6 confirm', f'{name} was confirmed while it was {old.status}')
        if new.token and new.token != old.token:
            # Who was given up may claim anew before its code has started.
            self.given_up.pop(new.token, None)
        if new.token and new.lease != old.lease and old.loss != ENDING:
            self.leases[new.token] = new.lease
        if actor.header and actor.header['incarnation'] != self._incarnation(storage):
            self.broken('3 incarnation', f'{name} was written by a message of another session')
        self._check_due(uid, name, new, self._dues(uid))
        if self.world.trace is not None:
            changed = [
                f'{column} {a}->{b}'
                for column, a, b in zip(Row._fields, old, new, strict=True)
                if a != b and column != 'rev'
            ]
            self.world.note(
                f'wrote {uid} {name} [{actor.kind} {_short(actor.what)}] {", ".join(changed)}'
            )

    def deleted(self, storage: Any, document: Document, *, by_sweep: bool) -> None:
        """Look at a session that was deleted."""
        facts = self.sessions.get(document.incarnation)
        if facts is not None:
            facts.deleted = True
        alive = [
            name for name, row in document.rows.items()
            if row.status in ALIVE or row.loss == ENDING
            or (row.status == 'unstarted' and brought_by(row.body))
        ]
        if by_sweep and alive:
            self.broken('retention', f'{storage.uid} expired although {alive} were alive')
        self.world.note(f'deleted {storage.uid}')

    def taken(self, taken: Taken, before: Mapping[tuple[str, str], int]) -> None:
        """Look at what a sweep took of the due dates."""
        for entry in taken.entries:
            at = before.get((entry.uid, entry.name))
            if at is None or at > taken.now:
                self.broken('4 index', f'{entry} was taken, which is not due')
            self._check_in_time(entry.uid, entry.name)
            late = taken.now - max(entry.at, self.world.healed_at)
            if self.world.healed and late > MOST_LATE and not self.world.happened['poison']:
                self.broken('5 in time', f'{entry} was taken {late} ms too late')
            self.world.happened['swept'] += 1
            if not entry.calm:
                self.world.happened['swept after an outage'] += 1
        if taken.entries:
            self.world.note(f'took {[(e.uid, e.name, e.calm) for e in taken.entries]}')

    def refused_success(self, delivery: Any) -> None:
        """Look at a success that did not count, though the storage answered."""
        header = delivery.header
        document = self.storage_class.space().documents.get(header['uid'])
        row = document.rows.get(delivery.name) if document is not None else None
        if (
            row is not None
            and document.incarnation == header['incarnation']
            and row.task_id == header['task_id']
            and row.status in ALIVE
        ):
            self.broken('3 first success', f'{delivery.name} is {row.status} after its success')

    # ----------------------------------------------------- what each must obey

    def _check_in_time(self, uid: str, name: str) -> None:
        """Look whether a message went missing that nobody can have lost."""
        document = self.storage_class.space().documents.get(uid)
        row = document.rows.get(name) if document is not None else None
        if row is None or LOSING & self.world.rates.keys():
            return
        ending = row.loss == ENDING
        sent = row.status == 'scheduled' and not (row.eta and not row.sends)
        if not (sent or ending) or (row.eta > self.world.storage_time and not ending):
            return
        application = self.application
        messages = [
            *application.broker.queue,
            *application.broker.unacked,
            *(held.message for worker in application.workers for held in worker.held),
        ]
        headers = [
            (m.header['task_id'], m.header['attempt'])
            for m in messages if (m.run == END) == ending
        ]
        run = self.runs.get((uid, name))
        claims = ending or run is None or application.tasks[run].claims
        if claims and (row.task_id, row.attempt) not in headers:
            self.broken('5 in time', f'{name} of {uid} waits, and there is no message')

    def _check_step(self, uid: str, name: str, old: Row | None, new: Row) -> None:
        self.world.happened[f'status {new.status}'] += 1
        if old is None or old.status == new.status:
            return
        if (old.status, new.status) not in STEPS:
            self.broken('2 table', f'{name} went from {old.status} to {new.status}')
        if old.status in ALIVE and new.status == 'abandoned':
            self.broken('7 released', f'{name} was abandoned while it was {old.status}')
        if old.status == 'failed' and new.status == 'finished':
            reason = json.loads(old.body).get('metadata', {}).get('reason')
            self.world.happened['late success'] += 1
            if reason not in LOST and self.actor.kind != 'person':
                self.broken('2 table', f'{name} finished after it had failed: {reason}')

    def _check_right(
        self, uid: str, incarnation: str, name: str, old: Row | None, new: Row
    ) -> None:
        """Look whether whoever ended or took back an instance was allowed to."""
        actor = self.actor
        if old is None or (old.status, old.token, old.attempt) == (
            new.status, new.token, new.attempt,
        ):
            return
        if old.status == 'running':
            self.given_up[old.token] = actor.kind
        if actor.kind == 'person' and actor.what[0] in ('metadata', 'fire') and (
            old.status in ALIVE
        ):
            self.broken('3 stale token', f'{name} was changed by {actor.what}')
        if actor.kind == 'report' and old.status != 'unstarted':
            self._check_report(incarnation, name, old, actor)
        if actor.kind in ('report', 'sweep') and old.status in ALIVE:
            self._check_outcome(incarnation, name, new)
        if actor.kind == 'sweep' and old.status == 'running':
            self._check_takeover(name, old, new)

    def _check_run(self, storage: Any, commit: Commit) -> None:
        """Look whether a run that fires something still stands for its instance."""
        header, token = self.actor.header, self.actor.token
        if header['incarnation'] != commit.incarnation:
            self.broken('3 incarnation', f'{header["instance"]} fires into another session')
        row = storage._document().rows[header['instance']]
        if token and (row.status, row.token) != ('running', token):
            self.broken('3 stale run', f'{header["instance"]} fires with {token}: {row}')

    def _check_outcome(self, incarnation: str, name: str, new: Row) -> None:
        """Look whether some run of the code really ended so."""
        wanted = {'finished': 'return', 'skipped': 'skip'}.get(new.status)
        if wanted is None:
            return
        key = (incarnation, name)
        # The result of a gate may be that of one it replays, or of an earlier session.
        task_id = new.task_id if brought_by(new.body) else None
        endings = [
            e.ending.kind for e in self.executions
            if (e.key == key or e.header['task_id'] == task_id) and e.ending
        ]
        if wanted not in endings:
            self.broken('2 outcome', f'{name} is {new.status}, but its code ended so: {endings}')

    def _check_report(self, incarnation: str, name: str, old: Row, actor: Actor) -> None:
        header = actor.header
        if header['incarnation'] != incarnation or header['task_id'] != old.task_id:
            self.broken('3 incarnation', f'{name} was changed by a message that is not its own')
        success = actor.what == 'success'
        if old.status == 'running' and actor.token != old.token and not success:
            self.broken(
                '3 stale token', f'{name} of {old.token} was changed by {actor.token}: {actor.what}'
            )
        if old.status not in ALIVE and not success:
            self.broken('3 stale token', f'{name} is {old.status} and was changed: {actor.what}')
        if old.status == 'scheduled' and not success:
            if header['attempt'] != old.attempt:
                self.broken('3 attempt', f'{name} was ended by attempt {header["attempt"]}')
            if actor.token in json.loads(old.body).get('lost', ()):
                self.broken('3 stale token', f'{name} was ended by {actor.token}, given up before')

    def _check_takeover(self, name: str, old: Row, new: Row) -> None:
        if new.status == 'finished':
            # Its stored success counts, whoever has it.
            return
        now = self.world.storage_time
        # A clock that is set back while somebody decides makes a lease hold again.
        if old.lease > now and self.world.jumped_at < self.world.now - 1000:
            self.broken(
                '3 lease', f'{name} was taken from {old.token}, whose lease holds for '
                f'{old.lease - now} ms'
            )
        results = self.application.results
        stored = results.stored.get(old.task_id)
        # What is stored between the question and the commit nobody can know of.
        asked = results.asked.get(old.task_id)
        unseen = stored is not None and asked is not None and stored.at >= asked
        if stored is not None and stored.state == 'SUCCESS' and not unseen and self._was_up():
            self.broken('5 stored result', f'{name} was given up, and its result is stored')
        execution = next((e for e in self.executions if e.token == old.token), None)
        if execution is not None and execution.ended is None and self._is_healthy(execution):
            self.broken(
                '10 healthy run', f'{name} was taken from {old.token}, which runs undisturbed'
            )

    def _was_up(self) -> bool:
        return bool(self.application.results.down_until < self.world.now - 1000)

    def _is_healthy(self, execution: Execution) -> bool:
        process = execution.process
        host = process.host
        if process.dead or host.dead:
            return False
        recently = self.world.now - 3 * self.world.lease
        if sum(at > recently for at in self.world.disturbed) > 1:
            return False
        return max(process.disturbed_at, host.disturbed_at) < execution.started

    def _check_claim(self, uid: str, name: str, old: Row, new: Row, now: int) -> None:
        self.world.happened['status running'] += 1
        if old.status not in ALIVE or new.status != 'running':
            self.broken('2 table', f'{name} went from {old.status} to {new.status} by a claim')
        if old.status == 'running' and old.lease > now:
            self.broken('3 lease', f'{name} was claimed from {old.token}, whose lease holds')
        if old.status == 'running':
            self.broken('3 one judge', f'{name} was claimed from {old.token} by {new.token}')
        if old.eta > now:
            self.broken('6 ETA', f'{name} was claimed {old.eta - now} ms before its time')
        header = self.actor.header
        if header and (header['task_id'], header['attempt']) != (old.task_id, old.attempt):
            self.broken('3 attempt', f'{name} attempt {old.attempt} was claimed by {header}')

    def deadline_of(self, uid: str, name: str, row: Row) -> int:
        """Return when a waiting instance expires, by the session's configuration; 0: never."""
        if row.status != 'unstarted':
            return 0
        gate = brought_by(row.body)
        if gate is not None:
            within = gate.within
            return gate.until or (row.changed + int(within * 1000) if within else 0)
        space = self.storage_class.space()
        digest = json.loads(space.documents[uid].head)['c']
        task = _configuration(space.configurations[digest]).get(name.rpartition('#')[0])
        within = task.within if task is not None else None
        return row.changed + int(within * 1000) if within is not None else 0

    def _check_due(self, uid: str, name: str, row: Row, dues: Mapping[str, int]) -> None:
        at = dues.get(name)
        if self.deadline_of(uid, name, row):
            if at is None:
                self.broken('4 index', f'{name} has a deadline and no due date')
            return
        gate = brought_by(row.body)
        refreshes = gate is not None and gate.shown and self.settings.limits.gate_refresh
        if row.status == 'unstarted' and refreshes:
            if at is None:
                self.broken('4 index', f'{name} waits at a gate that is never shown again')
            return
        if row.status not in ALIVE and row.loss != ENDING:
            if at is not None:
                self.broken('4 index', f'{name} is {row.status} and has a due date')
            return
        if at is None:
            self.broken('4 index', f'{name} is {row.status} and has no due date')
        now, settings = self.world.storage_time, self.settings
        latest = now + int(1000 * settings.lease)
        if row.status == 'running':
            latest = max(latest, row.lease)
        else:
            latest = max(latest, row.lease)
            again = settings.redeliver_after * 2 ** row.sends
            wait = max(settings.dispatch_grace, again)
            latest = max(latest, row.eta, now) + int(1000 * wait)
        # Everything was due earlier by the storage's clock if that was set back since.
        if at is not None and at > latest + self.world.jumps_back:
            self.broken('4 index', f'{name} is {row.status}, due only in {at - now} ms')

    def _dues(self, uid: str) -> dict[str, int]:
        return dict(self.storage_class.space().agenda._dates.get(uid, {}))

    def _incarnation(self, storage: Any) -> str:
        return str(storage._document().incarnation)

    # ---------------------------------------------------------------- executions

    def granted(self, token: str) -> None:
        """Note that a delivery was told that it has the claim."""
        self.claims[token] = self.world.now

    def start(self, header: Mapping[str, Any], token: str, task: Any) -> Execution:
        """Note that code starts now, and look whether it may."""
        world = self.world
        key = (str(header['incarnation']), str(header['instance']))
        attempt = (*key, int(header['attempt']))
        assert world.current is not None
        execution = Execution(key, header, token, world.current, world.now)
        if task.claims:
            if not task.late and self.starts[attempt] > self.rejected[attempt]:
                self.broken('6 early', f'{key[1]} attempt {attempt[2]} started twice')
            self._check_alone(execution)
        self.executions.append(execution)
        self.starts[attempt] += task.claims and not task.late
        world.happened['execution'] += 1
        world.note(f'code of {key[1]} starts, attempt {header["attempt"]}, token {token}')
        return execution

    def _check_alone(self, execution: Execution) -> None:
        token, name = execution.token, execution.key[1]
        lost_to = self.given_up.get(token)
        if lost_to == 'sweep' and self.world.jumped_at < self.claims.get(token, 0):
            self.broken('6 still mine', f'{name} starts with {token}, which the sweep gave up')
        for other in self.executions:
            if other.key != execution.key or other.ended is not None or other.process.dead:
                continue
            if self.leases.get(other.token, 0) > self.world.storage_time and (
                other.token not in self.given_up
            ):
                self.broken('5 alone', f'{name} starts while {other.token} runs it')

    def end(self, execution: Execution, ending: Any) -> None:
        """Note that code has ended, and how."""
        execution.ended, execution.ending = self.world.now, ending
        if ending.kind == 'reject':
            self.rejected[(*execution.key, int(execution.header['attempt']))] += 1
        self.world.note(f'code of {execution.key[1]} ends')

    # ------------------------------------------------------------------- helpers

    def note_run(self, release: Any) -> None:
        """Note as what an instance is sent."""
        self.runs[release.manager.uid, release.instance.name] = release.config.run

    @staticmethod
    def _records(commit: Commit) -> list[Record]:
        found = [
            (int(key[2:]), *json.loads(text))
            for key, text in commit.puts.items()
            if key.startswith('h:')
        ]
        return [
            (trigger, kwargs, event, cause)
            for _, trigger, kwargs, _, event, cause, _ in sorted(found, key=lambda r: r[0])
        ]

    def _cascade(self, facts: SessionFacts, trigger: str, cause: str | None) -> None:
        if trigger == 'sessionFinalized' and cause is None:
            facts.causes['', trigger] += 1
            if facts.causes['', trigger] > 1:
                self.broken('8 finalized', f'{facts.uid} was finalized twice')
        if cause is None:
            return
        facts.causes[cause, trigger] += 1
        if facts.causes[cause, trigger] > 1:
            self.broken('2 one outcome', f'{trigger} of {cause} was fired twice')


def _short(what: Any) -> str:
    return str(what if what is not None else '')[:70]
