"""What a configuration may say, and how a wrong one is refused."""

from __future__ import annotations

import logging
from enum import Enum
from typing import Any

import pytest

from celery_triggers import all_of, any_of, at_least
from celery_triggers.engine.conditions import On
from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.forms import parse_condition
from celery_triggers.engine.task_config import TaskConfig
from celery_triggers.exceptions import InvalidConfiguration


def parse(**directives: Any) -> TaskConfig:
    return Configuration.parse({'t_x': {'run': 'x', **directives}})['t_x']


@pytest.mark.parametrize(
    ('directives', 'directive', 'words'),
    [
        ({'after': 'paid'}, 'after', r"write \['paid'\]"),
        ({'after': 7}, 'after', 'list of trigger names'),
        ({'after': [7]}, 'after', 'must be a string'),
        ({'after': ['']}, 'after', 'must not be empty'),
        ({'after': [None]}, 'after', 'must be a string'),
        ({'after': {'some': ['a']}}, 'after', '"any"'),
        ({'after': {'any': []}}, 'after', 'at least one'),
        ({'after': {'any': 'a'}}, 'after', 'list'),
        ({'after': {'any': ['a'], 'all': ['b']}}, 'after', 'no condition'),
        ({'after': {'atLeast': 3, 'of': ['a', 'b']}}, 'after', 'from 1 to 2'),
        ({'after': {'atLeast': 0, 'of': ['a', 'b']}}, 'after', 'from 1 to 2'),
        ({'after': {'atLeast': True, 'of': ['a', 'b']}}, 'after', 'whole number'),
        ({'after': [{'trigger': 'a', 'when': 'n > 1'}]}, 'after', "'when' .* not known; \"where\""),
        ({'after': [{'trigger': 'a', 'times': 0}]}, 'after', 'from 1 on'),
        ({'after': [{'trigger': 'a', 'times': True}]}, 'after', 'whole number'),
        ({'after': [{'trigger': 'a', 'times': {'$kwarg': ['b']}}]}, 'after', r'\[trigger, name\]'),
        ({'after': [{'trigger': 'a', 'times': {'$kwarg': ['b', 7]}}]}, 'after', 'name of a kwarg'),
        ({'after': [{'trigger': 'a', 'as': ''}]}, 'after', '"as" must not be empty'),
        ({'after': ['a', {'trigger': 'a', 'times': 2}]}, 'after', 'received as .* another "as"'),
        ({'after': ['a'], 'unless': [{'trigger': 'b', 'as': 'a'}]}, 'unless', 'received as'),
        (
            {'after': [{'trigger': 'a', 'times': {'$kwarg': ['a', 'n']}}]},
            'after', 'its own kwargs and could never hold',
        ),
        (
            {'after': [
                {'trigger': 'a', 'times': {'$kwarg': ['b', 'n']}},
                {'trigger': 'b', 'times': {'$kwarg': ['a', 'n']}},
            ]},
            'after', 'could never hold',
        ),
        ({'andEvery': {'trigger': 'a', 'times': 2}}, 'andEvery', 'stands under "after"'),
        ({'after': [{'trigger': 'a', 'where': ''}]}, 'after', 'expression in CEL'),
        ({'after': [{'trigger': 'a', 'where': 'n >'}]}, 'after', 'not understood: 1:4'),
        ({'after': ['a'], 'unless': 'b'}, 'unless', r"write \['b'\]"),
        ({'after': ['a'], 'unless': [[7]]}, 'unless', 'must be a string'),
        ({'andEvery': ['a']}, 'andEvery', 'one trigger name'),
        ({'andEvery': ''}, 'andEvery', 'must not be empty'),
        ({'andEvery': 'a', 'and_every': 'a'}, 'and_every', 'twice'),
        ({'after': ['a'], 'run': None}, 'run', 'Celery task'),
        ({'after': ['a'], 'run': 7}, 'run', 'Celery task'),
        ({'after': ['a'], 'run': {'name': 'x'}}, 'run', 'signature'),
        ({'after': ['a'], 'withParams': ['a']}, 'withParams', 'object of objects'),
        ({'after': ['a'], 'withParams': {'a': 7}}, 'withParams', 'object of objects'),
        ({'after': ['a'], 'withParams': {'a': {'f': object()}}}, 'withParams', 'JSON'),
        ({'after': ['a'], 'using': 7}, 'using', 'must be a string'),
        ({'after': ['a'], 'within': 0}, 'within', 'number of seconds'),
        ({'after': ['a'], 'within': -1}, 'within', 'number of seconds'),
        ({'after': ['a'], 'within': True}, 'within', 'number of seconds'),
        ({'after': ['a'], 'within': '60'}, 'within', 'number of seconds'),
        ({'after': ['a'], 'within': float('inf')}, 'within', 'number of seconds'),
        ({'after': ['a'], 'within': float('nan')}, 'within', 'number of seconds'),
        ({'after': []}, 'after', 'can never run'),
        ({}, 'after', 'can never run'),
        ({'after': ['a'], 'note': {1, 2}}, None, 'JSON'),
        ({'after': ['a', []]}, 'after', 'must not be empty'),
        ({'after': any_of('a', all_of())}, 'after', 'must not be empty'),
        ({'after': ['a'], 'unless': {'any': ['b', {'all': ['c', []]}]}}, 'unless', 'not be empty'),
        ({'after': {'atLeast': 2, 'of': ['a', 'a']}}, 'after', 'from 1 to 1'),
        ({'after': [{'trigger': ['a', 'b']}]}, 'after', 'name of one'),
        ({'after': ['a'], 'unles': ['b']}, 'unles', 'did you mean "unless"'),
        ({'after': ['a'], 'andevery': 'b'}, 'andevery', 'did you mean "andEvery"'),
        ({'after': ['a'], 'and-every': 'b'}, 'and-every', 'did you mean "andEvery"'),
        ({'aftr': ['a']}, 'aftr', 'did you mean "after"'),
        ({'after': ['a'], 'withParam': {}}, 'withParam', 'did you mean "withParams"'),
    ],
)
def test_a_malformed_directive_is_named_with_its_mend(
    directives: dict[str, Any], directive: str | None, words: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        parse(**directives)
    assert (caught.value.task, caught.value.directive) == ('t_x', directive)


@pytest.mark.parametrize('name', ['', 7, 't_x:failed', 't_x:expired'])
def test_a_trigger_task_needs_a_name(name: Any) -> None:
    with pytest.raises(InvalidConfiguration):
        Configuration.parse({name: {'after': ['a'], 'run': 'x'}})


@pytest.mark.parametrize('value', [None, [], 'text', [('t_x', {})]])
def test_a_configuration_is_a_mapping(value: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='maps the names'):
        Configuration.parse(value)


@pytest.mark.parametrize('value', [None, [], 'text'])
def test_directives_are_a_mapping(value: Any) -> None:
    with pytest.raises(InvalidConfiguration, match='directives'):
        Configuration.parse({'t_x': value})


def test_json_and_python_keys_mean_the_same() -> None:
    camel = parse(after=['a'], andEvery='d', withParams={'a': {'n': 1}})
    snake = parse(after=['a'], and_every='d', with_params={'a': {'n': 1}})
    assert camel == snake


def test_unknown_directives_are_kept_for_custom_managers() -> None:
    config = parse(after=['a'], priority={'level': 3})
    assert config.extra == {'priority': {'level': 3}}
    assert config.to_json()['priority'] == {'level': 3}


def test_a_condition_answers_in_iter_and_len_over_trigger_names() -> None:
    config = parse(after=[{'any': ['a', 'b']}, 'c', 'a'], unless=['e'])
    assert 'a' in config.after
    assert 'e' not in config.after
    assert list(config.after) == ['a', 'b', 'c']
    assert len(config.after) == 3
    assert (list(config.unless), len(parse(after=['a']).unless)) == (['e'], 0)


def test_sets_have_one_meaning_whatever_their_order() -> None:
    one = Configuration.parse({'t_x': {'run': 'x', 'after': {'a', 'b', 'c'}}})
    two = Configuration.parse({'t_x': {'run': 'x', 'after': {'c', 'b', 'a'}}})
    assert one.digest == two.digest


@pytest.mark.parametrize(
    'condition',
    [
        any_of('a', 'b'),
        all_of('a', any_of('b', all_of('c', 'd'))),
        at_least(2, 'a', 'b', any_of('c', 'd')),
        any_of('a', 'b') & 'c',
        'c' | all_of('a', 'b'),
        any_of(all_of('a', 'b'), at_least(1, 'c')),
    ],
    ids=repr,
)
def test_a_condition_survives_its_json(condition: Any) -> None:
    again = parse_condition(condition.to_json())
    names = list(condition)
    for bits in range(2 ** len(names)):
        received = {name for i, name in enumerate(names) if bits >> i & 1}
        assert again.holds(received) == condition.holds(received)


def test_python_forms_refuse_what_is_no_condition() -> None:
    with pytest.raises(InvalidConfiguration):
        any_of(7)
    with pytest.raises(InvalidConfiguration):
        at_least(3, 'a')


def test_a_leaf_in_python_and_in_json() -> None:
    assert parse(after=On('a')).to_json()['after'] == ['a']
    assert parse(after={'trigger': 'a'}) == parse(after=['a'])


@pytest.mark.parametrize('outcome', ['abandoned', 'expired'])
def test_a_cycle_of_abandonments_alone_is_refused_with_its_names(outcome: str) -> None:
    with pytest.raises(InvalidConfiguration, match='t_a -> t_b -> t_a'):
        Configuration.parse({
            't_a': {'run': 'x', 'after': ['a'], 'unless': [f't_b:{outcome}']},
            't_b': {'run': 'x', 'after': ['a'], 'unless': [f't_a:{outcome}']},
        })


def test_a_cycle_through_runs_is_legal_and_warned_about(caplog: Any) -> None:
    configuration = Configuration.parse({
        't_a': {'run': 'x', 'andEvery': 't_b'},
        't_b': {'run': 'x', 'after': ['a'], 'andEvery': 't_a'},
    })
    with caplog.at_level(logging.WARNING):
        configuration.warn_about_cycles()
    assert 't_a -> t_b -> t_a' in caplog.text


class Name(str, Enum):
    """Names as applications keep them."""

    PAID = 'paid'


@pytest.mark.parametrize('condition', [
    [Name.PAID], any_of(Name.PAID), {'any': [Name.PAID]}, [{'trigger': Name.PAID}],
])
def test_a_member_of_an_enum_of_strings_is_its_value(condition: Any) -> None:
    config = parse(after=condition, andEvery=Name.PAID)
    assert list(config.after) == ['paid']
    assert config.and_every == 'paid'
    assert '"paid"' in Configuration({'t_x': config}).text


@pytest.mark.parametrize('build', [
    lambda: all_of('a', 'a'), lambda: any_of('a', 'b', 'a'), lambda: at_least(1, 'a', 'a', 'b'),
    lambda: all_of(any_of('a', 'a'), any_of('a', 'a')),
])
def test_a_member_that_is_named_twice_counts_once_and_reads_back(build: Any) -> None:
    written = Configuration({'t_x': parse(after=build())})
    assert Configuration.from_text(written.text).digest == written.digest
    with pytest.raises(InvalidConfiguration, match='from 1 to 2'):
        at_least(3, 'a', 'b', 'a')


def test_a_cycle_through_failures_is_warned_about(caplog: Any) -> None:
    Configuration.parse({
        't_a': {'run': 'x', 'andEvery': 't_b'},
        't_b': {'run': 'x', 'andEvery': 't_a:failed'},
    }).warn_about_cycles()
    assert 't_a -> t_b -> t_a' in caplog.text


def test_equal_content_has_one_digest_and_text_reads_back() -> None:
    one = Configuration.parse({
        't_b': {'after': ['a'], 'run': 'x'}, 't_a': {'run': 'y', 'after': ['b']},
    })
    again = Configuration.from_text(one.text)
    assert again.digest == one.digest
    assert dict(again) == dict(one)
    assert one.updated({'t_c': {'run': 'z', 'after': ['a']}}).digest != one.digest
