"""What came of a storm: counts, and how long it took until what a kill had hit had ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.checks import Run

#: An instance that was hit, and when, in seconds of the wall clock: ``(label, uid, name)``.
Hits = Iterator[tuple[tuple[str, str, str], float]]

OVER = ('finished', 'failed', 'replayed', 'skipped', 'revoked')


@dataclass
class Report:
    """What came of a storm."""

    title: str
    sessions: int = 0
    instances: int = 0
    executions: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    outages: Counter[str] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    recovery: dict[str, list[float]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    overlapping: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    seconds: float = 0.0
    healed_after: float = 0.0

    @property
    def wrong(self) -> list[str]:
        return [*self.lost, *self.doubled, *self.overlapping, *self.other]

    def markdown(self) -> str:
        """Return the report as two tables."""
        kills = ', '.join(f'{number} {role}' for role, number in sorted(self.kills.items()))
        outages = ', '.join(f'{what} {number} times' for what, number in self.outages.items())
        rows = [
            ('sessions, instances', f'{self.sessions}, {self.instances}'),
            ('duration of the kills', f'{self.seconds:.0f} s'),
            ('killed', f'{sum(self.kills.values())} processes: {kills}'),
            ('restarted', outages or 'nothing'),
            ('lost', len(self.lost)),
            ('doubled outcomes', len(self.doubled)),
            ('overlapping runs', len(self.overlapping)),
            ('other violations', len(self.other)),
            ('instances by executions', _listed(self.runs)),
            ('attempts by executions', _listed(self.attempts)),
            ('all healed after the last kill', f'{self.healed_after:.1f} s'),
        ]
        lines = [f'**{self.title}**', '', '| what | |', '| --- | --- |']
        lines += [f'| {name} | {value} |' for name, value in rows]
        lines += [
            '', '| time to recovery, outages included | number | p50 | p99 | max |',
            '| --- | --- | --- | --- | --- |',
        ]
        for what, times in self.recovery.items():
            if times:
                cells = (percentile(times, 0.5), percentile(times, 0.99), max(times))
                shown = ' | '.join(f'{seconds:.1f} s' for seconds in cells)
                lines.append(f'| {what} | {len(times)} | {shown} |')
        return '\n'.join(lines) + '\n'


def _listed(counts: Counter[int]) -> str:
    return ', '.join(
        f'{number} ran {"once" if times == 1 else f"{times} times"}'
        for times, number in sorted(counts.items())
    )


def percentile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def recoveries(
    runs: list[Run], kills: list[dict[str, Any]], received: list[dict[str, Any]],
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[float]]:
    """Return the seconds from a kill to the end of the instances that it hit, by kind.

    An instance that was hit several times counts from the last kill.
    """
    hits = {
        **dict(_hit_while_running(runs)),
        **dict(_hit_before_running(runs, kills, received)),
        **dict(_hit_while_releasing(kills, received, found)),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for (label, uid, name), wall in hits.items():
        instance = found.get(uid, {}).get(name)
        if instance is None:
            continue
        ends = [instance.timestamps[s].timestamp() for s in OVER if s in instance.timestamps]
        after = [end for end in ends if end >= wall - 0.01]
        if after:
            times[label].append(max(0.0, min(after) - wall))
    return dict(sorted(times.items()))


def _hit_while_running(runs: list[Run]) -> Hits:
    for run in runs:
        if run.kill is not None:
            label = 'its pool child is killed while it runs'
            if run.kill['target'] == run.ppid:
                label = "its worker's parent is killed while it runs"
            yield (label, run.uid, run.instance), run.kill['wall']


def _hit_before_running(
    runs: list[Run], kills: list[dict[str, Any]], received: list[dict[str, Any]]
) -> Hits:
    """Yield what a killed worker had received and not begun to run."""
    started: dict[tuple[str, str, int], int] = {}
    for run in runs:
        started.setdefault((run.uid, run.instance, run.attempt), run.start)
    deaths = {kill['target']: kill for kill in kills if kill['role'] == 'parent'}
    for line in received:
        kill = deaths.get(line['pid'])
        begun = started.get((line['uid'], line['instance'], line['attempt']))
        if kill is not None and (begun is None or begun > kill['at']):
            label = "its worker's parent is killed before it runs"
            yield (label, line['uid'], line['instance']), kill['wall']


def _hit_while_releasing(
    kills: list[dict[str, Any]], received: list[dict[str, Any]],
    found: Mapping[str, Mapping[str, Any]],
) -> Hits:
    """Yield what was released by a process that was killed before a worker received it."""
    first: dict[tuple[str, str], int] = {}
    for line in received:
        first.setdefault((line['uid'], line['instance']), line['at'])
    for kill in kills:
        if kill['role'] not in ('firing', 'sweeper'):
            continue
        for uid in kill['uids']:
            for name, instance in found.get(uid, {}).items():
                scheduled = instance.timestamps.get('scheduled')
                if (
                    scheduled is not None
                    and scheduled.timestamp() - 0.5 < kill['wall']
                    and first.get((uid, name), 0) > kill['at']
                ):
                    label = f'the {kill["role"]} process is killed before it is received'
                    yield (label, uid, name), kill['wall']
