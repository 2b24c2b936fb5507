"""When conditions hold: whole truth tables, and filters and counts at random."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_triggers import all_of, any_of, at_least, kwarg, on
from celery_triggers.engine import filters
from celery_triggers.engine.conditions import Condition
from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.forms import parse_condition
from celery_triggers.exceptions import InvalidConfiguration
from tests.unit.conftest import World

TRIGGERS = 'abcd'

Json = Any


# ------------------------------------------------------------------ truth tables


def branches(members: list[Json]) -> Iterator[Json]:
    """Every way to join members."""
    if len(members) == 1:
        yield members[0]
        return
    yield {'any': members}
    yield {'all': members}
    for count in range(2, len(members)):
        yield {'atLeast': count, 'of': members}


def partitions(names: str) -> Iterator[list[str]]:
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = ''.join(name for name in rest if name not in others)
            for more in partitions(left):
                yield [first + ''.join(others), *more]


def trees(names: str) -> Iterator[Json]:
    """Every condition of two levels in which each name stands once."""
    for groups in partitions(names):
        for members in itertools.product(*(list(branches(list(group))) for group in groups)):
            yield from branches(list(members))


def minimal_sets(condition: Json) -> set[frozenset[str]]:
    """Which sets of triggers are enough: said without asking whether anything holds."""
    if isinstance(condition, str):
        return {frozenset(condition)}
    members = [
        minimal_sets(member)
        for member in condition.get('any') or condition.get('all') or condition['of']
    ]
    wanted = len(members) if 'all' in condition else condition.get('atLeast', 1)
    return {
        frozenset().union(*choice)
        for some in itertools.combinations(members, wanted)
        for choice in itertools.product(*some)
    }


OVERLAPPING = [
    {'any': [{'all': ['a', 'b']}, {'all': ['a', 'c']}]},
    {'atLeast': 2, 'of': [{'all': ['a', 'b']}, {'all': ['b', 'c']}, {'all': ['c', 'd']}, 'd']},
    {'all': [{'any': ['a', 'b']}, {'any': ['b', 'c']}, {'atLeast': 2, 'of': ['a', 'c', 'd']}]},
]


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_a_condition_holds_from_the_firing_on_that_completes_it(size: int) -> None:
    conditions = list(trees(TRIGGERS[:size])) + (OVERLAPPING if size == 4 else [])
    for condition in conditions:
        enough = minimal_sets(condition)
        parsed = parse_condition([condition])
        for order in itertools.permutations(TRIGGERS[:size]):
            for length in range(size + 1):
                received = set(order[:length])
                wanted = any(some <= received for some in enough)
                assert parsed.holds(received) is wanted, (condition, received)
    assert len(conditions) >= size


@pytest.mark.parametrize(
    'number', range(4), ids=lambda number: f'part {number + 1}'
)
def test_every_order_of_firings_releases_or_abandons_as_the_table_says(
    world: World, number: int
) -> None:
    found = [*trees(TRIGGERS[:3]), *list(trees(TRIGGERS))[::11], *OVERLAPPING]
    unlesses = itertools.cycle([[], ['d'], [{'any': ['b', 'd']}], [{'all': ['a', 'c']}]])
    cases = list(zip(found, unlesses, strict=False))[number::4]
    for index, (after, unless) in enumerate(cases):
        world.configure({'t_x': {'after': [after], 'unless': unless}})
        releases = minimal_sets(after)
        forbids = minimal_sets({'all': unless}) if unless else set()
        for order in itertools.permutations(TRIGGERS):
            world.uid = f'{index}:{"".join(order)}'
            expected: list[str] = []
            for length in range(1, 5):
                received = set(order[:length])
                done = bool(expected) and expected[-1] in ('scheduled', 'abandoned')
                if done:
                    expected.append(expected[-1])
                elif any(some <= received for some in forbids):
                    expected.append('abandoned')
                elif any(some <= received for some in releases):
                    expected.append('scheduled')
                else:
                    expected.append('unstarted')
            heard = set().union(*releases, *forbids)
            seen: list[str] = []
            for trigger in order:
                world.fire(trigger)
                seen.append(world.statuses().get('t_x#0', 'unstarted'))
            # Before anything that concerns it has come there is no instance.
            assert seen == expected, (after, unless, order, heard)


# ------------------------------------------------------------ filters and counts

limits = st.integers(0, 3)
times = st.one_of(
    st.none(), st.integers(2, 3), st.just({'$kwarg': ['told', 'n']}),
    st.just({'$kwarg': ['first b', 'n']}),
)


@st.composite
def leaves(draw: Any) -> Json:
    """A leaf on a or b, perhaps with a filter and a count, under a key of its own."""
    leaf = {'trigger': draw(st.sampled_from('ab'))}
    if draw(st.booleans()):
        leaf['where'] = f'n >= {draw(limits)}'
    count = draw(times)
    if count is not None:
        leaf['times'] = count
    return {**leaf, 'as': repr(sorted(leaf.items(), key=str))}


wanted_leaves = st.lists(leaves(), min_size=1, max_size=3, unique_by=lambda leaf: leaf['as'])
payloads = st.one_of(
    st.integers(0, 4).map(lambda n: {'n': n}), st.just({}), st.just({'n': 'text'})
)
runs = st.lists(st.tuples(st.sampled_from(['a', 'b', 'told', 'z']), payloads), max_size=10)


def first_prefix(leaf: Json, fired: list[tuple[str, Json]]) -> tuple[int, Json] | None:
    """Return after how many firings a leaf holds, and with what; looked for from scratch."""
    if isinstance(leaf, str):
        leaf = {'trigger': leaf}
    for length in range(1, len(fired) + 1):
        passing = [
            kwargs for trigger, kwargs in fired[:length]
            if trigger == leaf['trigger'] and passes(leaf.get('where'), kwargs)
        ]
        wanted = leaf.get('times', 1)
        if isinstance(wanted, dict):
            key, name = wanted['$kwarg']
            told = first_prefix(
                {'trigger': 'b', 'where': 'n >= 0'} if key == 'first b' else 'told', fired[:length]
            )
            wanted = told[1].get(name) if told else None
        if isinstance(wanted, int) and len(passing) >= wanted:
            return length, passing[-1] if passing else {}
    return None


def passes(where: str | None, kwargs: Json) -> bool:
    if where is None:
        return True
    number = kwargs.get('n')
    return isinstance(number, int) and number >= int(where.rpartition(' ')[2])


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(wanted=wanted_leaves, unwanted=st.lists(leaves(), max_size=1), fired=runs)
def test_filters_and_counts_hold_when_the_session_has_seen_enough(
    wanted: list[Json], unwanted: list[Json], fired: list[tuple[str, Json]]
) -> None:
    # What tells how many is looked at wherever it stands; here it always stands.
    both = ['told', {'trigger': 'b', 'where': 'n >= 0', 'as': 'first b'}]
    world = World(triggers_unheard='ignore')
    # Told at once, so that the first instance sees every firing.
    world.configure({'t_x': {'after': [*wanted, {'any': [*both, 'start']}], 'unless': unwanted}})
    world.fire('start')
    fired = [('start', {}), *fired]
    for trigger, kwargs in fired[1:]:
        world.fire(trigger, kwargs)
    held = {leaf['as']: first_prefix(leaf, fired) for leaf in (*wanted, *unwanted)}
    holds = [held[leaf['as']] for leaf in wanted]
    released = max(found[0] for found in holds if found) if all(holds) else None
    stops = [held[leaf['as']] for leaf in unwanted]
    abandoned = max(found[0] for found in stops if found) if stops and all(stops) else None
    ends = min((end for end in (released, abandoned) if end), default=None)
    [instance] = world.storage()
    if ends is None:
        assert instance.status == 'unstarted'
    else:
        assert instance.status == ('abandoned' if ends == abandoned else 'scheduled')
    received = {
        key: found[1] for key, found in held.items()
        if found is not None and (ends is None or found[0] <= ends)
    }
    kept = {key: value for key, value in instance.kwargs.items() if key in held}
    assert kept == received


def test_uploads_whose_number_is_known_after_the_last_are_joined(world: World) -> None:
    world.configure({
        't_merge': {
            'after': [
                {'trigger': 'uploaded', 'times': {'$kwarg': ['closed', 'count']}}, 'closed',
            ],
        }
    })
    for number in range(3):
        world.fire('uploaded', {'file': number}, event_id=f'upload {number}')
        # A repeat is not another upload.
        assert world.fire('uploaded', {'file': number}, event_id=f'upload {number}').duplicate
    assert world.fire('closed', {'count': 4}).released == []
    assert world.fire('uploaded', {'file': 3}).released == ['t_merge#0']
    assert world.kwargs('t_merge#0') == {'closed': {'count': 4}, 'uploaded': {'file': 3}}


def test_none_is_enough_where_none_are_wanted(world: World) -> None:
    world.configure({
        't_merge': {'after': [{'trigger': 'uploaded', 'times': {'$kwarg': ['closed', 'count']}}]}
    })
    assert world.fire('closed', {'count': 0}).released == ['t_merge#0']
    assert world.kwargs('t_merge#0') == {'closed': {'count': 0}, 'uploaded': {}}


@pytest.mark.parametrize('count', [-1, True, 2.5, 'two', None, [2]])
def test_a_count_that_is_none_never_holds(world: World, count: Any) -> None:
    world.configure({'t_x': {'after': [on('a', times=kwarg('closed', 'count'))]}})
    world.fire('closed', {'count': count})
    for _ in range(4):
        assert world.fire('a').released == []


def test_a_later_instance_knows_the_latest_firing_that_matched(world: World) -> None:
    world.configure({
        't_x': {'after': [{'trigger': 'rate', 'where': 'value > 10.0'}], 'andEvery': 'asked'}
    })
    world.fire('rate', {'value': 11.5})
    world.fire('rate', {'value': 9.5})
    assert world.fire('asked').released == ['t_x#0']
    world.fire('rate', {'value': 12})
    world.fire('rate', {'value': 1})
    assert world.fire('asked').released == ['t_x#1']
    assert [world.kwargs(f't_x#{n}')['rate']['value'] for n in range(2)] == [11.5, 12]


def test_two_leaves_on_one_trigger_have_keys_of_their_own(world: World) -> None:
    world.configure({
        't_x': {
            'after': [
                {'trigger': 'bid', 'where': 'amount >= 100', 'as': 'high'},
                {'trigger': 'bid', 'where': 'amount < 100', 'as': 'low'},
            ],
        }
    })
    world.fire('bid', {'amount': 5})
    world.fire('bid', {'amount': 6})
    assert world.fire('bid', {'amount': 500}).released == ['t_x#0']
    assert world.kwargs('t_x#0') == {'high': {'amount': 500}, 'low': {'amount': 5}}


def test_a_payload_of_and_every_reaches_one_instance_beside_other_leaves(world: World) -> None:
    world.configure({
        't_x': {
            'after': [{'trigger': 'scan', 'where': 'heavy', 'as': 'heavy'}], 'andEvery': 'scan'
        }
    })
    for number in range(2):
        world.fire('scan', {'n': number, 'heavy': False})
    assert world.fire('scan', {'n': 2, 'heavy': True}).released == ['t_x#0', 't_x#1', 't_x#2']
    assert [world.kwargs(f't_x#{n}')['scan']['n'] for n in range(3)] == [0, 1, 2]
    assert all(world.kwargs(f't_x#{n}')['heavy']['n'] == 2 for n in range(3))


def test_past_firings_are_asked_by_filters_that_come_later(world: World) -> None:
    world.configure({'t_x': {'after': ['never']}})
    for value in (1, 20, 3):
        world.fire('a', {'value': value})
    manager = world.manager()
    later = {'after': [{'trigger': 'a', 'where': 'value > 10'}], 'run': 'x'}
    manager.update_configuration({'t_y': later})
    assert 't_y#0' not in world.statuses()
    manager.update_configuration({'t_z': later}, apply_past=True)
    assert world.kwargs('t_z#0') == {'a': {'value': 20}}


# --------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ('where', 'kwargs', 'expected'),
    [
        ('amount > 100', {'amount': 150}, True),
        ('amount > 100', {'amount': 150.5}, True),
        ('amount == 1', {'amount': 1.0}, True),
        ('user.name == "Ada" && size(tags) > 1', {'user': {'name': 'Ada'}, 'tags': [1, 2]}, True),
        ('tags.exists(tag, tag.startsWith("x"))', {'tags': ['y', 'xy']}, True),
        ('tags.exists(tag, tag.startsWith("x"))', {'tags': ['y']}, False),
        ('kwargs["package"] == kwargs["weight-kg"]', {'package': 3, 'weight-kg': 3}, True),
        ('has(kwargs.note) && note != ""', {}, False),
        ('has(kwargs.note) && note != ""', {'note': 'x'}, True),
        ('ready', {'ready': True}, True),
        ('timestamp(at) < timestamp("2026-01-01T00:00:00Z")', {'at': '2025-06-01T00:00:00Z'}, True),
        ('name.matches("^(a+)+$")', {'name': 'a' * 50_000 + 'b'}, False),
    ],
)
def test_a_filter_is_about_the_kwargs(where: str, kwargs: Any, expected: bool) -> None:
    assert filters.matches(filters.check_filter(where), 'a', kwargs) is expected


def test_what_json_has_no_type_for_is_compared_as_text(world: World) -> None:
    from datetime import datetime, timezone
    from decimal import Decimal
    from uuid import UUID

    kwargs = {
        'at': datetime(2025, 6, 1, tzinfo=timezone.utc), 'naive': datetime(2025, 6, 1),
        'price': Decimal('9.5'), 'id': UUID(int=7), 'days': {datetime(2025, 6, 1).date()},
    }
    where = (
        'timestamp(at) == timestamp(naive) && price < 10.0 && id.endsWith("7") '
        '&& "2025-06-01" in days'
    )
    world.configure({'t_x': {'after': [on('a', where=where)]}})
    assert world.fire('a', {**kwargs, 'days': ['2025-06-01']}).released == ['t_x#0']
    assert filters.matches(where, 'a', kwargs)


@pytest.mark.parametrize(
    ('where', 'kwargs', 'words'),
    [
        ('amount > 100', {}, 'No value with name "amount"'),
        ('amount > 100', {'amount': 'much'}, 'No matching overload'),
        ('amount > 100', {'amount': None}, 'No matching overload'),
        ('amount != 0', {'amount': 2**70}, 'out of range'),
        ('amount', {'amount': 7}, '7'),
        ('10 / amount == 1', {'amount': 0}, 'divide by zero'),
        ('all.all(x, all.all(y, true))', {'all': list(range(200))}, 'budget'),
        ('thing == 1', {'thing': object()}, 'Non-CEL'),
    ],
)
def test_what_cannot_be_evaluated_does_not_match_and_is_logged(
    caplog: pytest.LogCaptureFixture, where: str, kwargs: Any, words: str
) -> None:
    with caplog.at_level(logging.WARNING, 'celery_triggers'):
        assert not filters.matches(filters.check_filter(where), 'paid', kwargs)
    assert "a firing of 'paid' does not match" in caplog.text
    assert words in caplog.text


@pytest.mark.parametrize(
    ('where', 'words'),
    [
        ('amount >', r'not understood: 1:9: Syntax error'),
        ('1 + "a" == 2', r'no matching overload'),
        ('amount + 1', 'of the type INT, not true or false'),
        ('"paid"', 'of the type STRING'),
        ('launch(amount)', "undeclared reference to 'launch'"),
        ('amount.launch()', "undeclared reference to 'launch'"),
        ('type == "express"', r"kwargs\['<name>'\]"),
        ('package == 1', r"reserved identifier: package; .* kwargs\['<name>'\]"),
        ('a == 1 || ' * 100 + 'b == 1', '1000 characters at most'),
        ('(' * 200 + 'a' + ')' * 200, 'recursion'),
        (7, 'expression in CEL'),
        ('  ', 'expression in CEL'),
    ],
)
def test_a_filter_that_could_not_work_is_refused(where: Any, words: str) -> None:
    with pytest.raises(InvalidConfiguration, match=words):
        on('a', where=where)


def test_a_filter_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    filters._compiled.cache_clear()
    monkeypatch.setattr(filters, 'import_module', missing)
    with pytest.raises(InvalidConfiguration, match=r"pip install 'celery_triggers\[filters\]'"):
        on('a', where='n > 1')


# ----------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ('condition', 'json'),
    [
        (on('paid'), 'paid'),
        (on('paid', times=1), 'paid'),
        (on('paid', where='amount > 1'), {'trigger': 'paid', 'where': 'amount > 1'}),
        (on('paid', as_='money'), {'trigger': 'paid', 'as': 'money'}),
        (
            on('up', times=kwarg('closed', 'count')),
            {'trigger': 'up', 'times': {'$kwarg': ['closed', 'count']}},
        ),
        (
            on('paid', where='amount > 1', as_='twice', times=2) | 'free',
            {'any': [
                {'trigger': 'paid', 'where': 'amount > 1', 'as': 'twice', 'times': 2}, 'free',
            ]},
        ),
        (at_least(2, on('a', times=2), any_of('b', 'c'), 'd') & 'e', [
            {'atLeast': 2, 'of': [{'trigger': 'a', 'times': 2}, {'any': ['b', 'c']}, 'd']}, 'e',
        ]),
    ],
)
def test_what_is_said_in_python_can_be_said_in_json(condition: Condition, json: Any) -> None:
    assert condition.to_json() == json
    assert list(parse_condition([json]).leaves()) == list(condition.leaves())
    stored = Configuration.parse({'t_x': {'after': condition, 'run': 'x'}})
    assert Configuration.from_text(stored.text) == stored


def test_a_condition_lists_the_triggers_that_it_asks_about() -> None:
    condition = all_of(on('a', as_='first'), on('b', times=kwarg('c', 'n')))
    assert list(condition) == ['a', 'b', 'c']
    assert 'c' in condition
    assert 'first' not in condition


@pytest.mark.parametrize('arguments', [('',), (7,), (['a'],), ({'trigger': 'a'},), (on('a'),)])
def test_on_wants_a_trigger(arguments: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='a trigger name'):
        on(*arguments)


def test_explain_says_what_a_leaf_wants(world: World) -> None:
    world.configure({
        't_x': {
            'after': [
                on('paid', where='amount > 100'), on('up', times=kwarg('closed', 'n')),
                on('scan', times=3, as_='scans'),
            ],
        }
    })
    world.fire('scan')
    [told] = world.manager().explain('t_x')
    assert told.missing == ['paid', 'up', 'scan', 'closed']
    assert str(told) == (
        't_x#0 is unstarted: it has nothing and waits for paid where amount > 100, '
        'up as often as closed.n says, scan 3 times'
    )
