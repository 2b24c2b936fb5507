"""Each mechanism broken on purpose: the simulation must notice."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation, applied
from tests.simulation.run import run_seed

#: Within how many runs a broken mechanism must be caught.
MOST_RUNS = 3000


def runs_until_caught(mutation: Mutation, most: int = MOST_RUNS) -> tuple[int, str]:
    """Return after how many runs a mutation was caught, and by what."""
    with applied(mutation):
        for seed in range(most):
            violation = run_seed(seed, mutation.focus).violation
            if violation is not None:
                return seed + 1, str(violation)
    return most, ''


@pytest.mark.parametrize('mutation', MUTATIONS, ids=str)
def test_a_broken_mechanism_is_caught(mutation):
    runs, violation = runs_until_caught(mutation)
    print(f'{mutation}: caught after {runs} runs: {violation[:150]}')
    assert violation.startswith(mutation.breaks), violation or f'not within {runs} runs'
