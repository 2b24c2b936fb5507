"""Many writers in one session: nothing is lost, nothing is done twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from celery_triggers.testing.conformance import racers
from celery_triggers.testing.conformance.racers import Track, race_threads
from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.media import Medium


@pytest.fixture(scope='module')
def track() -> Iterator[Track]:
    """Four processes."""
    made = Track(4)
    yield made
    made.close()


@pytest.fixture
def wide_track() -> Iterator[Track]:
    """Eight processes."""
    made = Track(8)
    yield made
    made.close()


def check_items(medium: Medium, made: list[list[str]], racing: int, count: int) -> None:
    """Every payload is in exactly one instance, and each was reported to who made it."""
    session = medium.manager(racers.HELD).storage.load()
    wanted = [(racer, number) for racer in range(racing) for number in range(count)]
    payloads = [i.received['item'] for i in session.instances.values()]
    assert sorted((p['racer'], p['n']) for p in payloads) == wanted
    assert sorted(i.number for i in session.instances.values()) == list(range(racing * count))
    assert Counter(name for names in made for name in names) == Counter(list(session.instances))
    assert session.head.firings == session.latest['item'].count == racing * count
    assert session.head.unresolved == session.counts['t_each'].unstarted == racing * count
    assert session.waiting == {'never': set(session.instances)}


def check_order(medium: Medium, racing: int) -> None:
    """What one racer fired was applied in its order."""
    instances = medium.manager(racers.HELD).storage.load().instances.values()
    for racer in range(racing):
        own = [
            i.received['item']['n']
            for i in sorted(instances, key=lambda i: i.number)
            if i.received['item']['racer'] == racer
        ]
        assert own == sorted(own)


def test_threads_fire_into_one_session(medium: Medium):
    made = race_threads(racers.fire_many, 6, medium, 20)
    check_items(medium, made, 6, 20)
    check_order(medium, 6)


def test_processes_fire_into_one_session(shared_medium: Medium, track: Track):
    """Also the first firing of all, which makes the session and, in SQLite, the file."""
    made = track.race(racers.fire_many, shared_medium, 25)
    check_items(shared_medium, made, 4, 25)
    check_order(shared_medium, 4)


@pytest.mark.big_race
def test_eight_processes_fire_500_times_each_into_one_session(
    shared_medium: Medium, wide_track: Track, record_property: Any
):
    start = time.monotonic()
    made = wide_track.race(racers.fire_many, shared_medium, 500)
    record_property('seconds', round(time.monotonic() - start, 1))
    check_items(shared_medium, made, 8, 500)
    check_order(shared_medium, 8)


def test_what_processes_release_is_handed_to_a_runner_once(shared_medium: Medium, track: Track):
    handed = track.race(racers.fire_and_run, shared_medium, 40)
    names = [f't_each#{number}' for number in range(160)]
    assert Counter(name for part in handed for name in part) == Counter(names)
    manager = shared_medium.manager(racers.RELEASED)
    assert statuses(manager) == dict.fromkeys(sorted(names, key=_by_number), 'scheduled')


def _by_number(name: str) -> int:
    return int(name.rpartition('#')[2])


def test_the_last_part_of_a_join_releases_it(shared_medium: Medium, track: Track):
    released = track.race(racers.fire_own_trigger, shared_medium, 15)
    uids = [uid for part in released for uid in part]
    assert Counter(uids) == Counter(f'join:{number}' for number in range(15))


def test_an_event_that_comes_from_everywhere_is_applied_once(shared_medium: Medium, track: Track):
    applied = track.race(racers.fire_same_event, shared_medium, 25)
    assert Counter(n for part in applied for n in part) == Counter(range(25))
    assert len(statuses(shared_medium.manager(racers.HELD))) == 25


def test_one_of_many_claims_is_granted(shared_medium: Medium, track: Track):
    manager = shared_medium.manager(racers.RELEASED)
    names = [manager.fire('item').released[0] for _ in range(20)]
    granted = track.race(racers.claim_all, shared_medium, names)
    assert Counter(name for part in granted for name in part) == Counter(names)
    assert set(statuses(manager).values()) == {'running'}


def test_one_of_many_outcomes_counts(shared_medium: Medium, track: Track):
    manager = shared_medium.manager(racers.RELEASED)
    names = [manager.fire('item').released[0] for _ in range(10)]
    counted = track.race(racers.finish_all, shared_medium, names)
    assert Counter(name for part in counted for name in part) == Counter(names)
    cascades = [r.cause for r in manager.storage.history if r.trigger == 't_each']
    assert Counter(cascades) == Counter(names)
