"""Many simulated runs: no promise is broken, and nothing that can go wrong was left out.

``TRIGGERS_SIMULATION_RUNS`` makes so many runs, ``TRIGGERS_SIMULATION_SEED`` begins elsewhere.
"""

from __future__ import annotations

import os

import pytest

from celery_triggers.engine.transitions import Status
from celery_triggers.sweep import SweepReport
from tests.simulation.choices import Choices, shrink
from tests.simulation.run import FAULTS, run_once, run_seed
from tests.simulation.running import ENDINGS
from tests.simulation.tally import Tally, explain, run_many

RUNS = int(os.environ.get('TRIGGERS_SIMULATION_RUNS', '5000'))
SEED = int(os.environ.get('TRIGGERS_SIMULATION_SEED', '1'))

#: So many runs are enough to see everything that can happen.
ENOUGH = 3000

#: How gates end of which those who wait for the result know nothing.
ENDED_UNTOLD = ('abandoned', 'revoked', 'failed', 'finished')

#: What a sweep reports of itself, not of what it did.
_NO_DEED = {'more', 'next_at'}


@pytest.fixture(scope='module')
def tally():
    print(f'seeds {SEED} to {SEED + RUNS - 1}')
    total = Tally()
    for part in run_many(SEED, RUNS, min(os.cpu_count() or 1, 2)):
        total.add(part)
    return total


@pytest.mark.timeout(max(900, RUNS // 5))
def test_no_run_breaks_a_promise(tally):
    assert tally.runs == RUNS
    if tally.failures:
        seeds = ', '.join(f'{seed} ({violation[:80]})' for seed, violation in tally.failures[:5])
        pytest.fail(f'{len(tally.failures)} violations: {seeds}\n{explain(tally.failures[0][0])}')


@pytest.mark.skipif(RUNS < ENOUGH, reason='so few runs do not see everything')
def test_everything_happened(tally):
    expected = {
        *FAULTS,
        *(f'status {status}' for status in Status),
        *(f'sweep: {name}' for name in SweepReport.__slots__ if name not in _NO_DEED),
        *(f'code: {ending}' for ending in ENDINGS if ending != 'fire'),
        'late success', 'firing repeated', 'session deleted', 'poison', 'swept after an outage',
        'firing delayed', 'firing taken back',
        *(f'gate {status}' for status in Status if status is not Status.RUNNING),
        *(f'end to be told: {status}' for status in ENDED_UNTOLD),
        'gate applied again', 'gate found applied', 'gate copied', 'gate replayed',
        'end told', 'end retried', 'chord part counted', 'shown to wait',
    }
    assert not expected - {name for name, count in tally.happened.items() if count}


def test_a_run_can_be_repeated():
    first = run_seed(SEED + 7)
    again = run_once(Choices(recorded=first.taken))
    assert again.taken == first.taken
    assert again.happened == first.happened


def test_shrinking_leaves_what_matters():
    def fails(candidate):
        # Fails if a 3 comes before a 5, whatever else there is.
        return candidate if 3 in candidate and 5 in candidate[candidate.index(3) :] else None

    assert shrink([1, 2, 0, 3, 4, 4, 0, 5, 1, 9], fails) == [3, 5]


def test_a_violation_is_found_and_shrunk(monkeypatch):
    from celery_triggers.manager.delivery import Delivery

    monkeypatch.setattr(Delivery, 'beat_write', _beat_of_nobody(Delivery.beat_write))
    seed = next(seed for seed in range(SEED, SEED + 500) if run_seed(seed).violation)
    text = explain(seed, seconds=5)
    assert 'VIOLATION' in text
    assert 'shrunk to' in text


def _beat_of_nobody(original):
    def beat_write(self):
        write = original(self)
        write.guards = []
        return write

    return beat_write
