"""The short examples, each with its worker, on Redis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.acceptance.example_worker import ROOT, Example, running


def example(name: str, folder: pytest.TempPathFactory) -> Iterator[Example]:
    with running(f'examples.{name}', folder.mktemp(name)) as started:
        yield started


@pytest.fixture(scope='module')
def orders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    yield from example('orders', tmp_path_factory)


@pytest.fixture(scope='module')
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    yield from example('uploads', tmp_path_factory)


@pytest.fixture(scope='module')
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    yield from example('report', tmp_path_factory)


@pytest.fixture(scope='module')
def nightly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    yield from example('nightly', tmp_path_factory)


# --------------------------------------------------------------------- orders


@pytest.mark.parametrize('first', ['paid', 'packed'])
def test_an_order_is_shipped_in_whatever_order_it_is_paid_and_packed(
    orders: Example, first: str
) -> None:
    uid = orders.uid('order')
    kwargs = {'paid': {'amount': 99}, 'packed': {'box': 'A4'}}
    second = 'packed' if first == 'paid' else 'paid'
    orders.app.triggers.fire(uid, first, kwargs[first])
    orders.app.triggers.fire(uid, 'scanned', {'place': 'Zwolle'})
    assert orders.settled(uid)['t_track#0'] == 'unstarted'
    orders.app.triggers.fire(uid, second, kwargs[second])
    assert orders.result(uid, 't_ship#0') == {'parcel': 'P-A4'}
    orders.app.triggers.fire(uid, 'scanned', {'place': 'Utrecht'})
    orders.app.triggers.fire(uid, 'cancelled')  # too late
    assert orders.settled(uid, 't_ship#0', 't_track#1') == {
        't_refund#0': 'unstarted', 't_ship#0': 'finished',
        't_track#0': 'finished', 't_track#1': 'finished',
    }
    places = re.findall(rf'{uid} parcel P-A4 is in (\w+)', orders.log)
    assert sorted(places) == ['Utrecht', 'Zwolle']


def test_an_order_that_is_cancelled_after_payment_is_refunded(orders: Example) -> None:
    uid = orders.uid('order')
    orders.app.triggers.fire(uid, 'paid', {'amount': 25})
    orders.app.triggers.fire(uid, 'cancelled')
    orders.app.triggers.fire(uid, 'packed', {'box': 'A5'})
    assert orders.result(uid, 't_refund#0') == {'refunded': 25}
    assert orders.settled(uid) == {'t_refund#0': 'finished', 't_ship#0': 'abandoned'}


def test_a_payment_that_comes_after_the_cancellation_is_refunded_too(orders: Example) -> None:
    uid = orders.uid('order')
    orders.app.triggers.fire(uid, 'cancelled')
    assert orders.settled(uid) == {'t_refund#0': 'unstarted', 't_ship#0': 'abandoned'}
    orders.app.triggers.fire(uid, 'paid', {'amount': 7})
    assert orders.result(uid, 't_refund#0') == {'refunded': 7}


def test_the_command_of_the_orders(orders: Example) -> None:
    shipped, cancelled = re.findall(r'^order:\w+', orders.run(), re.MULTILINE)
    assert set(orders.settled(shipped, 't_track#0', 't_track#1').values()) <= {
        'finished', 'unstarted'
    }
    assert orders.result(cancelled, 't_refund#0') == {'refunded': 25}
    assert f'{shipped} parcel P-A4 is in Utrecht' in orders.log


# -------------------------------------------------------------------- uploads


def test_a_batch_is_merged_once_it_is_known_how_many_there_are(uploads: Example) -> None:
    uid, upload, close = uploads.uid('batch'), uploads.module.upload, uploads.module.close
    upload(uid, 'a.txt', 'one two')
    assert not upload(uid, 'b.txt', 'three').duplicate
    # Sent twice: the same event, which counts once.
    assert upload(uid, 'b.txt', 'three').duplicate
    close(uid, count=3)
    assert uploads.settled(uid, 't_process#0', 't_process#1') == {
        't_confirm#0': 'unstarted', 't_merge#0': 'unstarted',
        't_process#0': 'finished', 't_process#1': 'finished',
    }
    upload(uid, 'c.txt', 'four five six')
    words = {'a.txt': 2, 'b.txt': 1, 'c.txt': 3}
    assert uploads.result(uid, 't_merge#0') == {'words': words}
    assert uploads.result(uid, 't_confirm#0') == {'files': list(words)}
    assert f'{uid} has 6 words; c.txt was processed last' in uploads.log


def test_an_upload_that_comes_twice_is_processed_once(uploads: Example) -> None:
    uid, upload, close = uploads.uid('batch'), uploads.module.upload, uploads.module.close
    for _ in range(3):
        upload(uid, 'a.txt', 'one two')
    close(uid, count=1)
    assert uploads.result(uid, 't_merge#0') == {'words': {'a.txt': 2}}
    assert uploads.settled(uid) == {
        't_confirm#0': 'finished', 't_merge#0': 'finished', 't_process#0': 'finished',
    }


def test_the_command_of_the_uploads(uploads: Example) -> None:
    printed = uploads.run()
    assert 'the second time counts: False' in printed
    (uid,) = set(re.findall(r'^batch:\w+', printed, re.MULTILINE))
    assert uploads.result(uid, 't_merge#0')['words'] == {'a.txt': 6, 'b.txt': 4, 'c.txt': 4}


# --------------------------------------------------------------------- report


def test_a_report_with_all_its_feeds_does_not_wait_for_closing_time(report: Example) -> None:
    uid = report.uid('report')
    closing = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1)
    report.module.expect(uid, until=closing)
    assert report.storage(uid)['t_report#0'].deadline == closing
    for feed, figure in {'weather': 3, 'sales': 1, 'stock': 2}.items():
        report.app.triggers.fire(uid, feed, {'figure': figure})
    assert report.result(uid, 't_report#0') == {'sales': 1, 'stock': 2, 'weather': 3}
    assert report.settled(uid) == {'t_report#0': 'finished'}


@pytest.mark.parametrize('feeds', [{}, {'sales': 1, 'weather': 3}], ids=['none', 'two'])
def test_a_report_makes_do_with_what_there_is(report: Example, feeds: dict[str, int]) -> None:
    uid = report.uid('report')
    report.module.expect(uid, until=datetime.now(timezone.utc) + timedelta(seconds=1))
    for feed, figure in feeds.items():
        report.app.triggers.fire(uid, feed, {'figure': figure})
    # Nothing is fired when the deadline comes: the worker sees to it.
    assert report.result(uid, 't_report_what_there_is#0') == feeds
    report.app.triggers.fire(uid, 'stock', {'figure': 2})
    report.app.triggers.fire(uid, 'sales', {'figure': 1})
    report.app.triggers.fire(uid, 'weather', {'figure': 3})
    assert report.settled(uid) == {
        't_report#0': 'abandoned', 't_report_what_there_is#0': 'finished',
    }


def test_the_command_of_the_report(report: Example) -> None:
    whole, part = re.findall(r'^report:\w+', report.run(), re.MULTILINE)
    assert report.result(whole, 't_report#0') == {'sales': 120, 'stock': 48, 'weather': 21}
    assert report.result(part, 't_report_what_there_is#0') == {'stock': 48}
    assert f'{part} lacks sales, weather' in report.log


# -------------------------------------------------------------------- nightly


def test_the_night_waits_for_the_warehouse(nightly: Example) -> None:
    night = nightly.uid('2130')
    result = nightly.module.import_orders(night).delay()
    waiting = result.parent  # the body of the chord, which is the gate
    nightly.wait_for(lambda: waiting.state == 'WAITING', 'the gate waits')
    assert not result.ready()
    nightly.module.open_warehouse(night).delay()
    totals = {'web': 35, 'dam': 12}
    assert result.get(timeout=30) == totals
    assert waiting.result == totals
    assert f'{night} is loaded: {totals}' in nightly.log


def test_a_warehouse_that_is_open_already_is_not_waited_for(nightly: Example) -> None:
    night = nightly.uid('2131')
    opened = nightly.module.open_warehouse(night).delay()
    nightly.wait_for(opened.ready, 'the warehouse is open')
    result = nightly.module.import_orders(night).delay()
    assert result.get(timeout=30) == {'web': 35, 'dam': 12}


def test_the_command_of_the_night_and_its_schedule(nightly: Example) -> None:
    night = nightly.run().split()[0]
    told = f'{night} is loaded: ' + repr({'web': 35, 'dam': 12})
    nightly.wait_for(lambda: told in nightly.log, 'the night is over')
    (scheduled,) = nightly.app.conf.beat_schedule.values()
    assert scheduled['task'] == nightly.module.begin.name


# ----------------------------------------------------------------------- index


def test_every_example_is_in_the_index_and_on_the_page() -> None:
    folder = ROOT / 'examples'
    names = {path.stem for path in folder.glob('*.py')} | {
        path.parent.name for path in folder.glob('*/__init__.py')
    }
    # What starts the workers of two of them.
    names -= {'__init__', 'workers'}
    for page in (folder / 'README.md', ROOT / 'docs' / 'examples.md'):
        text = Path(page).read_text()
        assert not [name for name in names if name not in text], page
