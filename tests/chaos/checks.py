"""What must hold after everything was healed, looked at from outside.

Nothing here asks the product whether it did well: executions come from the journal that the
tasks' code wrote, kills from that of those who killed, and the rest is counted in the stored
sessions. Each function returns what is wrong, in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.chaos.arena import Arena

#: Statuses of what is still on its way; what is unstarted waits, rightly or not.
MOVING = ('scheduled', 'running')


@dataclass
class Run:
    """One execution of a task's code.

    Attributes:
        end: When it ended, or when its process was killed; ``None`` if neither is known.
        whole: Whether it came to its end.
        kill: What the journal says of the kill that cut it short.
    """

    uid: str
    instance: str
    attempt: int
    task_id: str
    pid: int
    ppid: int
    start: int
    end: int | None = None
    whole: bool = False
    kill: Mapping[str, Any] | None = None


def runs_of(executions: Iterable[Mapping[str, Any]], kills: Iterable[Mapping[str, Any]]
            ) -> list[Run]:
    """Return every execution; one that was cut short ends with the kill of its process."""
    runs: dict[str, Run] = {}
    for line in executions:
        if line['what'] == 'start':
            runs[line['run']] = Run(
                line['uid'], line['instance'], line['attempt'], line['task_id'], line['pid'],
                line['ppid'], line['at'],
            )
        else:
            run = runs[line['run']]
            run.end, run.whole = line['at'], True
    deaths: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for kill in kills:
        if kill['do'] == 'kill':
            deaths[kill['target']].append(kill)
    for run in runs.values():
        # A child of a killed parent is killed with it.
        fatal = [*deaths[run.pid], *deaths[run.ppid]]
        if run.end is None and fatal:
            run.kill = min(fatal, key=lambda kill: kill['at'])
            # The kill is noted just before it is made: a run may start in between.
            run.end = max(run.start, run.kill['at'])
    return sorted(runs.values(), key=lambda run: run.start)


def overlaps(runs: Iterable[Run]) -> list[str]:
    """No instance may run in two places at once."""
    wrong = []
    by_instance: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_instance[run.uid, run.instance].append(run)
    for (uid, instance), ordered in by_instance.items():
        for earlier, later in pairwise(ordered):
            if earlier.end is None or later.start < earlier.end:
                wrong.append(
                    f'{instance} of {uid} ran in {earlier.pid} '
                    f'({earlier.start / 1e9:.3f} to {(earlier.end or 0) / 1e9:.3f}) and from '
                    f'{later.start / 1e9:.3f} on in {later.pid}'
                )
    return wrong


def double_starts(arena: Arena, runs: Iterable[Run]) -> list[str]:
    """Code that does not acknowledge late starts at most once for an attempt."""
    starts = defaultdict(list)
    for run in runs:
        if not task_of(arena, run.uid, run.instance).acks_late:
            starts[run.uid, run.instance, run.attempt].append(run)
    received = arena.journal.read('received')
    return [
        f'{key} started {len(found)} times: {found}, received as '
        f'{[message for message in received if message["uid"] == key[0]]}'
        for key, found in starts.items() if len(found) > 1
    ]


def task_of(arena: Arena, uid: str, instance: str) -> Any:
    """Return the Celery task that an instance of the chaos application runs."""
    scenario, _, kind = uid.partition(':')[0].partition('-')
    name = instance.partition('#')[0].removeprefix('t_')
    return arena.app.tasks[f'{scenario}_{kind}.{name}']


def out_of_order(runs: Iterable[Run]) -> list[str]:
    """No attempt starts after a later one."""
    wrong = []
    latest: dict[tuple[str, str], int] = {}
    for run in runs:
        key = (run.uid, run.instance)
        if run.attempt < latest.get(key, 0):
            wrong.append(f'attempt {run.attempt} of {key} ran after attempt {latest[key]}')
        latest[key] = max(run.attempt, latest.get(key, 0))
    return wrong


def cascades(arena: Arena, uid: str) -> list[str]:
    """Each instance has one outcome, and each outcome fired once."""
    fired = Counter(arena.fired(uid))
    wanted: Counter[str] = Counter()
    for instance in arena.instances(uid).values():
        if instance.status == 'finished':
            wanted[instance.task] += 1
        for status in ('failed', 'revoked', 'abandoned'):
            if status in instance.timestamps:
                wanted[f'{instance.task}:{status}'] += 1
    names = {
        name for name in {*fired, *wanted}
        if name.partition(':')[0].startswith('t_')
    }
    return [
        f'{name} was fired {fired[name]} times, not {wanted[name]}, in {uid}: '
        f'{arena.statuses(uid)}'
        for name in sorted(names) if fired[name] != wanted[name]
    ]


def inner_firings(arena: Arena, uid: str) -> list[str]:
    """What a task fires through its context is applied once, however often its code runs."""
    if not uid.startswith('join-late:'):
        # Others are replayed, and each replay is another run.
        return []
    number = arena.fired(uid).count('picked')
    return [] if number == 1 else [f'the task of {uid} fired {number} times, not once']


def unended(arena: Arena, uid: str) -> list[str]:
    """Nothing is left on its way."""
    return [
        f'{name} of {uid} is {status}' for name, status in arena.statuses(uid).items()
        if status in MOVING
    ]


def everything(arena: Arena, uids: Iterable[str]) -> list[str]:
    """Return whatever is wrong with these sessions and with what ran for them."""
    runs = runs_of(arena.journal.read('executions'), arena.journal.read('kills'))
    wrong = [*overlaps(runs), *double_starts(arena, runs), *out_of_order(runs)]
    for uid in uids:
        wrong += [
            *cascades(arena, uid), *inner_firings(arena, uid), *unended(arena, uid),
        ]
    return [*wrong, *(f'left in the index of due dates: {due}' for due in arena.dues())]
