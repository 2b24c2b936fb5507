"""Gates: what is applied, what the ledger sees of each, and who was told of its end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import ENDING
from celery_triggers.engine.step import WORKER_LOST
from celery_triggers.storages.records import Row
from tests.model.known import KNOWN_BUGS
from tests.simulation.facts import Actor
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.ledger import Ledger

Key = tuple[str, str]

#: Statuses in which an instance may still run.
BEFORE_ITS_END = ('unstarted', 'scheduled', 'running')

#: Reasons of a failure of which Celery knows nothing, however it stands with the chord.
UNTOLD = (WORKER_LOST, 'not delivered', 'cannot be dispatched', 'cannot be replayed')


@dataclass(slots=True, eq=False)
class GateFact:
    """A gate that somebody applied, perhaps more than once.

    Attributes:
        answered: Whether that returned, so that the caller relies on it.
    """

    uid: str
    name: str
    task_id: str
    directives: dict[str, Any]
    run: str
    until: int = 0
    fresh: bool = False
    delay: int = 0
    chord: bool = False
    stores: bool = True
    answered: bool = False

    def gate(self) -> Gate:
        """Return it as the product takes it."""
        options: dict[str, Any] = {}
        if self.chord:
            options['chord'] = {'task': 'body'}
        if not self.stores:
            options['ignore_result'] = True
        call = {'task': self.run, 'args': [], 'kwargs': {}, 'options': options}
        text = json.dumps({**self.directives, 'run': self.run}, sort_keys=True)
        return Gate(text, call, delay=self.delay, template='andEvery' in self.directives)


@dataclass(slots=True)
class Claim:
    """A right to tell an end, from when it was granted until the sweep takes it back.

    Attributes:
        by: Who was granted it.
        again: Whether a retry of the message that has it took it once more.
    """

    token: str
    by: set[Any]
    told: int = 0
    again: bool = False


@dataclass(slots=True, eq=False)
class Ending:
    """That an end was to be told, once.

    Attributes:
        given_up: Whether the broker lost its message as often as it may.
    """

    status: str
    given_up: bool = False
    claims: list[Claim] = field(default_factory=list)

    @property
    def told(self) -> int:
        return sum(claim.told for claim in self.claims)


@dataclass(frozen=True, slots=True)
class Brought:
    """What a row says of the gate that made it."""

    within: float | None
    until: int
    chord: bool
    template: bool
    shown: bool
    parent: str | None
    reason: str


@lru_cache(maxsize=4096)
def brought_by(body: str) -> Brought | None:
    """Return what a row's body says of its gate, ``None`` for an instance without one."""
    if '"gate"' not in body:
        return None
    values = json.loads(body)
    gate = values.get('gate')
    if gate is None:
        return None
    metadata = values.get('metadata', {})
    return Brought(
        json.loads(gate['directives']).get('within'), values.get('until', 0),
        bool(gate['call']['options'].get('chord')), gate.get('template', False),
        not gate['call']['options'].get('ignore_result'),
        metadata.get('parent'), metadata.get('reason', ''),
    )


class GateLedger:
    """Sees everything about gates, and breaks off a run when a promise about them is broken.

    Attributes:
        facts: What was applied, of all sessions.
        made: How many instances each application made, by incarnation and task id.
        endings: Ends that were to be told, by incarnation and instance, the latest last.
        parts: How often Celery counted a run as a part of its chord.
        results: How often Celery stored a result of a run, or of what became of its message.
        fired_by: Whose code fired under an event id that was made for it.
    """

    def __init__(self, world: World, ledger: Ledger):
        self.world = world
        self.ledger = ledger
        self.facts: list[GateFact] = []
        self.made: Counter[Key] = Counter()
        self.endings: dict[Key, list[Ending]] = {}
        self.parts: Counter[Key] = Counter()
        self.results: Counter[Key] = Counter()
        self.fired_by: dict[str, Key] = {}

    def broken(self, invariant: str, text: str) -> None:
        self.ledger.broken(invariant, text)

    # ------------------------------------------------------------------- changes

    def deleted(self, incarnation: str) -> None:
        """Tell what was applied before a session was deleted from what its medium repeats."""
        for known, task_id in [key for key in self.made if key[0] == incarnation]:
            self.made[f'{known}, deleted', task_id] += self.made.pop((known, task_id))

    def answered(self, fact: GateFact, outcome: Any) -> None:
        """Look at the answer that an application got."""
        if outcome.duplicate:
            self.world.happened['gate found applied'] += 1
        elif outcome.draft is not None and outcome.value is None:
            self.broken('11 applied once', f'{fact.task_id} was applied, and nobody says how')

    def committed(
        self, storage: Any, incarnation: str, rows: Mapping[str, tuple[Row | None, Row]],
        actor: Actor,
    ) -> None:
        """Look at the gates in a commit that was applied."""
        for name, (old, new) in rows.items():
            gate = brought_by(new.body)
            if gate is None:
                continue
            self.world.happened[f'gate {new.status}'] += 1
            if old is None:
                self._check_new(storage, incarnation, name, new, gate, actor)
            elif old.task_id != new.task_id:
                self.broken('11 task id', f'{name} was {old.task_id} and is {new.task_id}')
            known = storage.space().gates.get(new.task_id)
            waits = new.status == 'unstarted'
            if waits and known != (storage.uid, name):
                self.broken('11 waiting gates', f'{name} waits as {new.task_id}: {known}')
            if not waits and known == (storage.uid, name):
                self.broken('11 waiting gates', f'{name} is {new.status} and known to wait')
            if actor.kind == 'person' and actor.what[0] == 'revoke gate' and (
                name == actor.what[1] and old is not None and old.status != 'unstarted'
            ):
                self.broken('11 revoked', f'{name} was revoked while it was {old.status}')
            self._check_ending(incarnation, name, old, new, gate, actor)

    def _check_new(
        self, storage: Any, incarnation: str, name: str, new: Row, gate: Brought, actor: Actor
    ) -> None:
        """Look at a new instance: one that was applied, a copy, or one that replays another."""
        rows = storage._document().rows
        others = {n: row for n, row in rows.items() if n != name and brought_by(row.body)}
        if gate.parent is not None:
            self.world.happened['gate replayed'] += 1
            if others[gate.parent].task_id != new.task_id:
                self.broken('11 task id', f'{name} has not the task id of {gate.parent}')
            return
        if new.task_id in [row.task_id for row in others.values()]:
            self.broken('11 task id', f'{name} has the task id of another gate, {new.task_id}')
        applied = actor.kind == 'person' and actor.what[0] == 'gate'
        if applied and name.startswith(f'{actor.what[1]}#') and new.task_id == actor.what[2]:
            self.made[incarnation, new.task_id] += 1
            if self.made[incarnation, new.task_id] > 1:
                self.broken('11 applied once', f'{new.task_id} was applied twice, as {name} too')
            return
        if applied or not any(
            brought_by(row.body).template for row in others.values()  # type: ignore[union-attr]
        ):
            self.broken('11 applied once', f'nobody has applied {name}, {new.task_id}')
        self.world.happened['gate copied'] += 1

    def _check_ending(
        self, incarnation: str, name: str, old: Row | None, new: Row, gate: Brought, actor: Actor
    ) -> None:
        """Look whether an end is told that should be, and whether one still is."""
        key = (incarnation, name)
        ended = new.loss == ENDING
        if old is not None and old.loss == ENDING and not (ended and old.status == new.status):
            given_up = self.endings[key][-1]
            answered = new.status in ('replayed', 'finished') or ended
            if not answered and not given_up.told and 'skipped before told' not in KNOWN_BUGS:
                self.broken('11 told', f'{name} is {new.status}, and nobody was told')
        if ended and (old is None or old.loss != ENDING or old.status != new.status):
            self.endings.setdefault(key, []).append(Ending(new.status))
            self.world.happened[f'end to be told: {new.status}'] += 1
            if not self._may_be_told(old, new, gate, actor):
                self.broken('11 told too much', f'{name} is {new.status}: {gate.reason}')
        elif not ended and old is not None and old.status == 'unstarted' and (
            new.status not in BEFORE_ITS_END
        ):
            self.broken('11 told', f'{name} is {new.status}, and its end is not to be told')

    @staticmethod
    def _may_be_told(old: Row | None, new: Row, gate: Brought, actor: Actor) -> bool:
        """Tell whether Celery may know nothing of an end."""
        if old is None or old.status == 'unstarted' or old.loss == ENDING:
            return True
        if actor.kind == 'person' and actor.what[0] == 'set status':
            return True
        if new.status in ('finished', 'revoked'):
            return gate.chord
        if new.status == 'skipped':
            # By its code; a person skips what has told that it failed.
            return actor.kind == 'report'
        return new.status == 'failed' and (gate.chord or gate.reason in UNTOLD)

    def written(self, uid: str, incarnation: str, name: str, old: Row, new: Row) -> None:
        """Look at a conditional write to a gate whose end is to be told."""
        ending, actor = self.endings[incarnation, name][-1], self.ledger.actor
        if new.loss != ENDING:
            self._check_over(name, ending, old, actor)
        elif new.token and not old.token:
            ending.claims.append(Claim(new.token, {self.world.current}))
        elif new.token != old.token:
            # A clock that is set back while somebody looks makes a lease hold again.
            recently = self.world.jumped_at >= self.world.now - 1000
            gave_up = not new.token and actor.kind == 'end' and _is_of(old.token, actor.token)
            held = old.lease > self.world.storage_time and not recently
            if new.token or (held and not gave_up):
                self.broken('3 lease', f'the end of {name} was taken from {old.token}')
        elif new.token and actor.kind == 'end':
            ending.claims[-1].again = True
            ending.claims[-1].by.add(self.world.current)
            if not actor.what:
                self.broken('3 lease', f'the end of {name} was claimed twice by {old.token}')

    def _check_over(self, name: str, ending: Ending, old: Row, actor: Actor) -> None:
        """Look at an end that nobody has to tell any more."""
        if actor.kind == 'sweep':
            ending.given_up = True
            self.world.happened['end given up'] += 1
            if old.sends < self.ledger.settings.max_deliveries:
                self.broken('11 told', f'{name} is given up after {old.sends} messages')
        elif not ending.told:
            self.broken('11 told', f'{name} is done with, and nobody was told')
        elif not _is_of(old.token, actor.token):
            self.broken('11 told', f'{name} was done with by somebody else')

    # ------------------------------------------------------------------- telling

    def told(self, header: Mapping[str, Any], token: str, storage_class: Any) -> None:
        """Note that an end was told."""
        self.world.happened['end told'] += 1
        key = (str(header['incarnation']), str(header['instance']))
        document = storage_class.space().documents.get(header['uid'])
        if document is None or document.incarnation != key[0]:
            # Nobody can say any more whether it was told before.
            return
        row = document.rows[key[1]]
        if row.status in BEFORE_ITS_END:
            self.broken('11 told too much', f'{key[1]} is {row.status} and its end was told')
        if row.task_id != header['task_id']:
            self.broken('11 task id', f'{key[1]} is {row.task_id}, told was {header["task_id"]}')
        claims = [claim for ending in self.endings.get(key, ()) for claim in ending.claims]
        mine = [c for c in claims if _is_of(c.token, token) and self.world.current in c.by][-1]
        mine.told += 1
        # Whoever dies between the two leaves it to another, who cannot know how far he came.
        alone = all(process is self.world.current for process in mine.by if not process.dead)
        known = mine.again and ('told twice' in KNOWN_BUGS or (alone and len(mine.by) > 1))
        if mine.told > 1 and not known:
            self.broken('11 told once', f'the end of {key[1]} was told twice by {token}')

    def stored(self, header: Mapping[str, Any]) -> None:
        """Note that Celery has stored a result."""
        self.results[str(header['incarnation']), str(header['instance'])] += 1

    def counted(self, header: Mapping[str, Any]) -> None:
        """Note that Celery has counted a part of a chord."""
        self.parts[str(header['incarnation']), str(header['instance'])] += 1

    def fired(self, header: Mapping[str, Any], event_id: str, *, duplicate: bool) -> None:
        """Look at what code has fired under an id that it has not chosen."""
        key = (str(header['incarnation']), str(header['instance']))
        owner = self.fired_by.setdefault(event_id, key)
        if owner != key and duplicate and 'replay fires nothing' not in KNOWN_BUGS:
            self.broken('1 exactly once', f'{key} fires, and {owner} has taken its event id')


def _is_of(token: str, message: str) -> bool:
    """Tell whether a token is that of a delivery of a message."""
    return token.startswith(f'{message}:')
