"""How a session of the chaos application must end, told from what was fired into it.

The firings that were acknowledged and the plan in their kwargs decide it, apart from one
thing: a task that does not acknowledge late may have been lost, and is then ``failed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]


def problem(uid: str, plan: Mapping[str, Any], found: Found) -> str:
    """Say what is not as the rules demand, or not yet; ``''`` if all is well.

    Args:
        plan: What was fired, as the scenario's function below reads it.
        found: The session's instances by name.
    """
    scenario, _, kind = uid.partition(':')[0].partition('-')
    return next(filter(None, _SCENARIOS[scenario](kind, plan, found)), '')


def series(found: Found, task: str) -> list[Any]:
    """Return the instances of a trigger task by number."""
    own = [instance for instance in found.values() if instance.task == f't_{task}']
    return sorted(own, key=lambda instance: int(instance.name.rpartition('#')[2]))


def failures(found: Found, task: str) -> int:
    """Return how many instances of a task have failed at some time."""
    return sum('failed' in instance.timestamps for instance in series(found, task))


def finished(found: Found, task: str) -> bool:
    return any(instance.status == 'finished' for instance in series(found, task))


def _one(found: Found, kind: str, task: str, *, replays: int = 0, fails: bool = False) -> str:
    """Check a task that runs once, or again in the place of what was lost or replayed."""
    instances = series(found, task)
    if not instances:
        return f't_{task} is missing'
    *before, last = instances
    if kind == 'late' and len(before) != replays:
        return f't_{task} was replayed {len(before)} times, not {replays}'
    if any(instance.status != 'replayed' for instance in before):
        return f't_{task} has more than one end'
    allowed = {'failed'} if fails else {'finished'}
    if kind == 'early':
        allowed.add('failed')
    if last.status not in allowed:
        return f'{last.name} is {last.status}'
    if kind != 'early' and not fails and len(before) < replays:
        return f't_{task} was replayed {len(before)} times, not {replays}'
    return ''


def _follow(found: Found, task: str, count: int) -> str:
    """Check a task that acknowledges late and runs so many times, always with success."""
    instances = series(found, task)
    if len(instances) != count:
        return f't_{task} has {len(instances)} instances, not {count}'
    for instance in instances:
        if instance.status != 'finished':
            return f'{instance.name} is {instance.status}'
    return ''


def _chain(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    yield _one(found, kind, 'first')
    yield _follow(found, 'second', int(finished(found, 'first')))
    yield _follow(found, 'mourn_first', min(failures(found, 'first'), 1))


def _join(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    for task in ('pick', 'pack'):
        yield _one(found, kind, task)
        yield _follow(found, f'mourn_{task}', min(failures(found, task), 1))
    ships = series(found, 'ship')
    if plan.get('cancelled'):
        if [str(ship.status) for ship in ships] != ['abandoned']:
            yield f't_ship is {ships}, not abandoned'
    elif plan.get('paid', True) and finished(found, 'pick') and finished(found, 'pack'):
        yield _follow(found, 'ship', 1)
    elif any(ship.status != 'unstarted' for ship in ships):
        yield f't_ship is {ships} though it has to wait'


def _every(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    yield _follow(found, 'open', 1)
    scans = series(found, 'scan')
    originals = [scan for scan in scans if scan.depth == 0]
    numbers = sorted(scan.kwargs['scanned']['number'] for scan in originals)
    if numbers != list(range(plan['scans'])):
        yield f'the scans {numbers} have an instance each, not {plan["scans"]} of them'
    for scan in scans:
        allowed = {'finished', 'replayed'} | ({'failed'} if kind == 'early' else set())
        if scan.status not in allowed or (kind == 'late' and scan.status != 'finished'):
            yield f'{scan.name} is {scan.status}'
    if len(scans) - len(originals) != sum(scan.status == 'replayed' for scan in scans):
        yield 'not one new instance for each that was replayed'
    yield _follow(found, 'tell', sum(scan.status == 'finished' for scan in scans))
    yield _follow(found, 'mourn_scan', failures(found, 'scan'))


def _failure(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    yield _one(found, kind, 'try', fails=True)
    yield _follow(found, 'mourn_try', failures(found, 'try'))
    yield 't_never ran' if series(found, 'never') and finished(found, 'never') else ''


def _retry(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    for task in ('by_hand', 'by_itself'):
        yield _one(found, kind, task)
        yield _follow(found, f'mourn_{task}', min(failures(found, task), 1))
        for instance in series(found, task):
            if instance.status == 'finished' and instance.attempt != plan.get('attempts', 1):
                yield f'{instance.name} ended at attempt {instance.attempt}'
    both = all(finished(found, task) for task in ('by_hand', 'by_itself'))
    if both:
        yield _follow(found, 'both', 1)
    elif any(one.status != 'unstarted' for one in series(found, 'both')):
        yield 't_both did not wait'


def _replay(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    yield _one(found, kind, 'check', replays=plan.get('replays', 1))
    yield _follow(found, 'after_check', int(finished(found, 'check')))
    yield _follow(found, 'mourn_check', failures(found, 'check'))


def _pair(kind: str, plan: Mapping[str, Any], found: Found) -> Any:
    for task in ('left', 'right', 'body'):
        yield _follow(found, task, 1)


_SCENARIOS: dict[str, Any] = {
    'chain': _chain, 'join': _join, 'every': _every, 'failure': _failure, 'retry': _retry,
    'replay': _replay, 'pair': _pair,
}
