"""``python -m tests.simulation --runs N --seed S [--jobs J]``: many runs, and a verdict."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.simulation.tally import Tally, explain, run_many


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.simulation', description=__doc__)
    parser.add_argument('--runs', type=int, default=5000)
    parser.add_argument('--seed', type=int, default=1, help='the first seed')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1)
    parser.add_argument('--quiet', action='store_true', help='no list of what happened')
    options = parser.parse_args()
    print(f'seeds {options.seed} to {options.seed + options.runs - 1}, {options.jobs} processes')
    began, tally = time.monotonic(), Tally()
    for part in run_many(options.seed, options.runs, options.jobs):
        tally.add(part)
        if part.failures:
            print(f'{tally.runs} runs, {len(tally.failures)} violations', flush=True)
    seconds = time.monotonic() - began
    print(
        f'{tally.runs} runs in {seconds:.1f} s, {1000 * seconds / tally.runs:.2f} ms a run, '
        f'{len(tally.failures)} violations'
    )
    if not options.quiet:
        for name, count in sorted(tally.happened.items()):
            print(f'{count:10} {name} (in {tally.seen_in[name]} runs)')
    kinds: dict[str, int] = {}
    for seed, violation in sorted(tally.failures):
        kinds.setdefault(violation.partition(':')[0], seed)
        print(f'seed {seed}: {violation[:200]}')
    for seed in kinds.values():
        print(f'\n{explain(seed)}')
    return 1 if tally.failures else 0


if __name__ == '__main__':
    sys.exit(main())
