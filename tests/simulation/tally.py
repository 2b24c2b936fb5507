"""Many runs in some processes, and what came of all of them."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation.run import run_seed, shrink_result

#: How many runs a process makes before it tells of them.
BATCH = 100


@dataclass
class Tally:
    """What came of many runs.

    Attributes:
        failures: ``(seed, violation)`` of each run that broke a promise.
        happened: How often each kind of fault, status and answer occurred in all.
        seen_in: In how many runs each occurred.
    """

    runs: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    seen_in: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.runs += other.runs
        self.failures += other.failures
        self.happened.update(other.happened)
        self.seen_in.update(other.seen_in)


def run_seeds(seeds: range) -> Tally:
    """Run seeds one after the other."""
    tally = Tally()
    for seed in seeds:
        result = run_seed(seed)
        tally.runs += 1
        tally.happened.update(result.happened)
        tally.seen_in.update(result.happened.keys())
        if result.violation is not None:
            tally.failures.append((seed, str(result.violation)))
    return tally


def run_many(first: int, runs: int, jobs: int) -> Iterator[Tally]:
    """Run many seeds in some processes; yield what came of each batch."""
    batches = [
        range(start, min(start + BATCH, first + runs))
        for start in range(first, first + runs, BATCH)
    ]
    if jobs <= 1:
        yield from map(run_seeds, batches)
        return
    with multiprocessing.get_context('spawn').Pool(jobs) as pool:
        yield from pool.imap_unordered(run_seeds, batches)


def explain(seed: int, seconds: float = 20) -> str:
    """Return the shrunk run of a seed that fails, for people."""
    shrunk = shrink_result(run_seed(seed), seconds)
    return '\n'.join([
        f'seed {seed}, shrunk to {len(shrunk.taken)} choices: {shrunk.taken}',
        *shrunk.trace,
        str(shrunk.violation),
    ])
