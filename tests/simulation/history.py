"""What happened to a session, repeated in order by the naive reference of the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_triggers.engine.session import Session
from tests.model.reference import OUTCOMES, Instance, Reference
from tests.simulation.facts import Move, SessionFacts

if TYPE_CHECKING:
    from tests.simulation.run import Simulation


def check_by_reference(simulation: Simulation, session: Session, facts: SessionFacts) -> None:
    """Repeat every commit of a session; the reference must come to the same."""
    reference = Reference(simulation.scenario.configuration, simulation.scenario.finalizing)
    for move in facts.moves:
        if _Repeating(reference, move).do() is False:
            simulation.ledger.broken('1 reference', f'the rules do not allow {_told(move)}')
    aside = {i.name for i in reference.waiting_gates() if not i.keeps_open}
    if session.head.aside != len(aside):
        simulation.ledger.broken('1 reference', f'{session.head.aside} wait aside, not {aside}')
    got = {i.name: _plain(i.got) for i in reference.instances}
    received = {name: _plain(i.received) for name, i in session.instances.items()}
    for name in sorted(got.keys() & received.keys()):
        if got[name] != received[name]:
            simulation.ledger.broken(
                '1 reference', f'{name} received {received[name]}, not {got[name]}'
            )
    wanted = {i.name: i.status for i in reference.instances}
    found = {name: i.status.value for name, i in session.instances.items()}
    if wanted != found:
        simulation.ledger.broken('1 reference', f'statuses are {found}, not {wanted}')
    history = [(trigger, cause) for trigger, _, cause, _ in reference.history]
    stored = [(record.trigger, record.cause) for record in session.history]
    if history != stored:
        simulation.ledger.broken('1 reference', f'fired was {stored}, not {history}')


class _Repeating:
    """Does with the reference what one commit did, as its rows tell."""

    def __init__(self, reference: Reference, move: Move):
        self.reference = reference
        self.move = move

    def do(self) -> Any:
        """Return ``False`` if the rules do not allow it."""
        what = self.move.actor.what
        self.reference.now = max(self.reference.now, self.move.at)
        by_hand = self.move.actor.kind == 'person' and what[0] != 'fire'
        # What an application releases may fail to be sent, which is another commit.
        if by_hand and (what[0] != 'gate' or None in [old for old, _ in self.move.rows.values()]):
            return self._by_hand(*what)
        ended = [
            (name, old, new)
            for name, (old, new) in self.move.rows.items()
            if old is not None and old.status not in ('unstarted', new.status)
        ]
        if ended:
            return self._outcome(*ended[0])
        if self.move.records:
            trigger, kwargs, event, cause = self.move.records[0]
            if trigger.endswith(':expired') and cause is not None:
                return self.reference.expire(self._instance(cause))
            return not self.reference.fire(trigger, kwargs, event)
        # Something that the rules know nothing of, such as metadata.
        return True

    def _by_hand(self, kind: str, *args: Any) -> Any:
        reference = self.reference
        match kind:
            case 'update':
                return reference.update(*args)
            case 'cancel':
                return reference.cancel()
            case 'replay':
                return reference.replay(self._instance(args[0]), {}, by_hand=True)
            case 'skip':
                cascade = {} if args[1] else None
                return reference.skip_by_hand(self._instance(args[0]), cascade)
            case 'set status':
                return reference.set_status(self._instance(args[0]), args[1], None)
            case 'gate':
                return not reference.apply_gate(*args)
            case 'revoke gate':
                return reference.revoke_gate(self._instance(args[0]))
        return True

    def _outcome(self, name: str, old: Any, new: Any) -> Any:
        reference, instance = self.reference, self._instance(name)
        match new.status:
            case 'running':
                return reference.claim(instance)
            case 'scheduled':
                return reference.back(instance, new.attempt - old.attempt)
            case 'finished':
                return reference.finish(instance, self._cascade(name))
            case 'failed':
                reason = 'worker lost' if '"worker lost"' in new.body else 'raised'
                return reference.fail(instance, reason, token=True)
            case 'revoked':
                return reference.revoke(instance, token=True)
            case 'skipped':
                return reference.skip(instance)
            case 'replayed':
                return reference.replay(instance, {}, by_hand=False)
        return False

    def _instance(self, name: str) -> Instance:
        return self.reference.named(name)

    def _cascade(self, name: str) -> dict[str, Any]:
        task = name.rpartition('#')[0]
        return next(
            (kwargs for trigger, kwargs, _, cause in self.move.records
             if (trigger, cause) == (task, name)), {}
        )


def _plain(received: dict[str, Any]) -> dict[str, Any]:
    """Return what was received, but for what outcome triggers say for people."""
    return {key: None if key.endswith(OUTCOMES) else kwargs for key, kwargs in received.items()}


def _told(move: Move) -> str:
    changes = [f'{n}: {old.status if old else "-"} to {new.status}'
               for n, (old, new) in move.rows.items()]
    return f'{move.actor.kind} {move.actor.what}: {", ".join(changes)}'
