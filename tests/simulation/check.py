"""What must be true in the end, when everything is healed and quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_triggers.engine.instances import Instance
from celery_triggers.engine.session import Session
from celery_triggers.engine.step import WORKER_LOST
from celery_triggers.engine.transitions import Status
from tests.model.known import KNOWN_BUGS
from tests.simulation.application import READY
from tests.simulation.facts import FiringFact, SessionFacts
from tests.simulation.gates import BEFORE_ITS_END
from tests.simulation.history import check_by_reference
from tests.simulation.storage import POISON, URL, SimulatedStorageBackend

if TYPE_CHECKING:
    from tests.simulation.run import Simulation


def check_all(simulation: Simulation) -> None:
    """Check every invariant that is one of the end.

    Raises:
        Violation: One does not hold.
    """
    _check_quiet(simulation)
    _check_firings(simulation)
    _check_applied(simulation)
    for uid in simulation.documents():
        if uid == POISON:
            continue
        storage = SimulatedStorageBackend(uid, URL, application=simulation.application)
        session = storage.load()
        facts = simulation.ledger.sessions[session.head.incarnation]
        _check_counters(simulation, session)
        _check_history(simulation, session, facts)
        _check_every(simulation, session)
        _check_gates(simulation, session)
        check_by_reference(simulation, session, facts)


def _check_quiet(simulation: Simulation) -> None:
    broken = simulation.ledger.broken
    alive = simulation.alive()
    if alive:
        uid, name, row = alive[0]
        broken('5 nothing lost', f'{name} of {uid} is {row.status} for ever: {row}')
    if simulation.delayed():
        broken('5 nothing lost', f'{simulation.delayed()} are never applied')
    if not simulation.is_quiet:
        broken('5 nothing lost', 'the world does not come to rest')
    documents = simulation.documents()
    for uid, name, _ in simulation.due_dates():
        if uid == POISON:
            continue
        row = documents[uid].rows.get(name) if uid in documents else None
        if row and row.status == 'unstarted' and simulation.ledger.settings.limits.gate_refresh:
            # The state of a gate's result is stored again for as long as it waits.
            continue
        if name and not (row and simulation.is_forsaken(uid, name, row)):
            broken('4 index', f'{name} of {uid} has a due date in the end')


def _check_firings(simulation: Simulation) -> None:
    ledger = simulation.ledger
    applied = {
        event for facts in ledger.sessions.values() for event in facts.events
    }
    for fact in ledger.firings:
        if fact.event_id is not None:
            if _is_expected(simulation, fact) and fact.event_id not in applied:
                ledger.broken('1 exactly once', f'{fact} was acknowledged and not applied')
            continue
        counts = [_count(facts, fact) for facts in ledger.sessions.values()]
        # Once in each session of that name: it may have been deleted before a repetition.
        if max(counts, default=0) > 1 or (_is_expected(simulation, fact) and not any(counts)):
            ledger.broken('1 exactly once', f'{fact} was applied so often: {counts}')


def _is_expected(simulation: Simulation, fact: FiringFact) -> bool:
    """Tell whether a firing must have been applied somewhere."""
    gone = any(
        fact.asked & (facts.delayed.keys() if facts.deleted else facts.taken_back)
        for facts in simulation.ledger.sessions.values()
    )
    return fact.answered and not gone


def _count(facts: SessionFacts, fact: FiringFact) -> int:
    if facts.uid != fact.uid:
        return 0
    return sum(
        cause is None and (trigger, kwargs) == (fact.trigger, fact.kwargs)
        for trigger, kwargs, _, cause in facts.records
    )


def _check_counters(simulation: Simulation, session: Session) -> None:
    broken = simulation.ledger.broken
    instances = list(session.instances.values())
    if session.head.unresolved != sum(not i.is_resolved for i in instances):
        broken('4 counters', f'{session.uid}: unresolved is {session.head.unresolved}')
    for task, counts in session.counts.items():
        own = [i for i in instances if i.task == task and i.gate is None]
        recount = (
            sum(i.task == task for i in instances),
            sum(not i.is_resolved for i in own),
            sum(i.status is Status.UNSTARTED for i in own),
        )
        if (counts.total, counts.unresolved, counts.unstarted) != recount:
            broken('4 counters', f'{task} of {session.uid}: {counts}, not {recount}')
    waiting = {
        (leaf.trigger, i.name)
        for i in instances
        if i.status is Status.UNSTARTED
        for leaf in getattr(session.config_of(i), 'leaves', ())
        if leaf.key not in i.received
    }
    if {(t, n) for t, names in session.waiting.items() for n in names} != waiting:
        broken('4 waiting lists', f'{session.uid}: {session.waiting}, not {waiting}')
    for instance in instances:
        given_up = instance.gate is not None and 'given up with a token' in KNOWN_BUGS
        if bool(instance.token) != (instance.status is Status.RUNNING) and not given_up:
            broken('3 token', f'{instance.name} is {instance.status} with {instance.token!r}')


def _check_applied(simulation: Simulation) -> None:
    ledger = simulation.ledger
    for fact in ledger.gates.facts:
        made = [
            ledger.gates.made[incarnation, fact.task_id]
            for incarnation, facts in ledger.sessions.items() if facts.uid == fact.uid
        ]
        if fact.answered and not any(made):
            ledger.broken('11 applied once', f'{fact} was acknowledged and not applied')


def _check_gates(simulation: Simulation, session: Session) -> None:
    broken = simulation.ledger.broken
    gates = [i for i in session.instances.values() if i.gate is not None]
    waiting = [i for i in gates if i.status is Status.UNSTARTED]
    recount = (len(waiting), sum(i.gate.aside for i in waiting if i.gate))
    if (session.head.gates, session.head.aside) != recount:
        broken('4 counters', f'{session.uid}: {session.head}, not {recount}')
    space = SimulatedStorageBackend.space()
    known = {t: name for t, (uid, name) in space.gates.items() if uid == session.uid}
    if known != {i.task_id: i.name for i in waiting}:
        broken('11 waiting gates', f'{session.uid}: {known}, not {waiting}')
    for instance in gates:
        _check_told(simulation, session.head.incarnation, instance)


def _check_told(simulation: Simulation, incarnation: str, instance: Instance) -> None:
    """Look whether those who wait for a gate's result know that it has ended."""
    ledger, key = simulation.ledger.gates, (incarnation, instance.name)
    if str(instance.status) in (*BEFORE_ITS_END, 'replayed') or instance.gate is None:
        return
    endings = ledger.endings.get(key, [])
    told = any(ending.told for ending in endings)
    if endings and endings[-1].given_up and not told:
        return
    if not told and _why_untold(instance) in KNOWN_BUGS:
        return
    options = instance.gate.call['options']
    stored = simulation.application.results.stored.get(instance.task_id)
    # That there is a retry Celery stores after it was sent, and so perhaps after its end.
    known = stored is not None and stored.state in (*READY, 'RETRY')
    if 'shown to wait too late' in KNOWN_BUGS and (told or ledger.results[key]):
        known = True
    if not (known or options.get('ignore_result')):
        ledger.broken('11 told', f'{instance.name} is {instance.status}, its result {stored}')
    if instance.gate.in_chord and not told and not ledger.parts[key]:
        ledger.broken('11 told', f'{instance.name} is {instance.status}, its chord waits')


def _why_untold(instance: Instance) -> str:
    """Return the bug because of which it may be that nobody knows of an instance's end."""
    reason = instance.metadata.get('reason')
    if reason == WORKER_LOST:
        return 'loss untold'
    if reason == 'cannot be replayed':
        return 'failed replay untold'
    return {
        Status.SKIPPED: 'skip untold', Status.REVOKED: 'stored revocation untold',
    }.get(instance.status, '')


def _check_history(simulation: Simulation, session: Session, facts: SessionFacts) -> None:
    stored = [(r.trigger, r.kwargs, r.event_id, r.cause) for r in session.history]
    if stored != facts.records:
        simulation.ledger.broken('1 history', f'{stored} is stored, not {facts.records}')


def _check_every(simulation: Simulation, session: Session) -> None:
    """Every payload of an andEvery reaches exactly one original instance."""
    for name, config in session.configuration.items():
        every = config.and_every
        if every is None or simulation.was_updated(session.uid):
            continue
        payloads = [r.kwargs for r in session.history if r.trigger == every]
        own = [
            i.received[every]
            for i in session.instances_of(name)
            if 'parent' not in i.metadata and every in i.received
        ]
        if _sorted(payloads) != _sorted(own):
            simulation.ledger.broken(
                '7 every payload', f'{name} received {own} of {every}, fired were {payloads}'
            )


def _sorted(values: list[Any]) -> list[str]:
    return sorted(map(repr, values))
