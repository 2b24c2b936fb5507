"""Storms: short ones of each kind in ``make test``, long ones in ``make chaos``."""

from __future__ import annotations

import os

import pytest

from tests.chaos.conftest import LONG
from tests.chaos.places import RabbitServer
from tests.chaos.storm import storm

#: Broker, storage, and whether it is part of the short version too: RabbitMQ takes a quarter
#: of a minute to start.
STORMS = [('redis', 'redis', True), ('redis', 'sql', False), ('rabbitmq', 'redis', False),
          ('rabbitmq', 'sql', False)]


@pytest.mark.parametrize(
    ('broker', 'storage'), [(broker, storage) for broker, storage, short in STORMS
                            if short or LONG]
)
def test_nothing_is_lost_and_nothing_doubled_in_a_storm(nursery, tmp_path, broker, storage):
    if broker == 'rabbitmq' and RabbitServer.binary() is None:
        pytest.skip('there is no RabbitMQ to start')
    seed = int(os.environ.get('TRIGGERS_CHAOS_SEED', '3'))
    report = storm(
        nursery, tmp_path, os.environ.get('TRIGGERS_CHAOS_REPORT'),
        seconds=240 if LONG else 20, sessions=2000 if LONG else 150, broker=broker,
        storage=storage, seed=seed,
    )
    assert not report.wrong, '\n'.join(report.wrong[:20])
    assert report.instances > report.sessions
    assert sum(report.kills.values()) >= (150 if LONG else 8)
    assert set(report.outages) == {'broker', 'storage'}
