"""The JSON Schema says what the code says: it lets pass what is read, and no more than it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from celery_triggers import all_of, any_of, at_least, kwarg, on
from celery_triggers.engine import calls
from celery_triggers.engine.conditions import On
from celery_triggers.engine.configuration import MOST_SECONDS, parse_task
from celery_triggers.engine.filters import MOST_CHARACTERS
from celery_triggers.engine.names import OUTCOMES
from celery_triggers.engine.schema import configuration_schema
from celery_triggers.engine.task_config import DIRECTIVES
from celery_triggers.exceptions import InvalidConfiguration
from tests.unit import test_configuration

VALIDATOR = Draft202012Validator(configuration_schema())

GATE = {'task': 'g', 'subtask_type': calls.GATE, 'kwargs': {'x': {'$kwarg': 'its own affair'}}}


def is_valid(directives: Any, name: str = 't_x') -> bool:
    return VALIDATOR.is_valid({name: directives})


def is_accepted(directives: Any) -> bool:
    try:
        parse_task('t_x', directives)
    except InvalidConfiguration:
        return False
    return True


def test_the_schema_is_one_and_survives_json() -> None:
    Draft202012Validator.check_schema(configuration_schema())
    assert json.loads(json.dumps(configuration_schema(), allow_nan=False)) == configuration_schema()


def test_a_caller_may_change_what_it_got() -> None:
    configuration_schema()['$defs']['task']['properties']['within'].clear()
    configuration_schema()['$defs']['signature']['properties']['options']['properties'].clear()
    assert configuration_schema() == VALIDATOR.schema


def test_every_directive_is_in_it_and_described_in_a_sentence() -> None:
    properties = configuration_schema()['$defs']['task']['properties']
    assert properties.keys() == DIRECTIVES.keys()
    for name, value in properties.items():
        assert value['description'].endswith('.'), name
        assert '`' not in value['description'], name


def test_every_member_of_a_leaf_and_of_a_signature_is_in_it() -> None:
    definitions = configuration_schema()['$defs']
    leaf = on('a', as_='b', times=kwarg('c', 'n')).to_json() | {'where': 'n > 1'}
    assert definitions['leaf']['properties'].keys() == leaf.keys()
    assert definitions['signature']['properties'].keys() == {'task', *calls.KINDS}


ACCEPTED: list[dict[str, Any]] = [
    {'after': ['a']},
    {'after': ['a', 'a']},
    {'after': [['a', ['b']], 'c']},
    {'after': {'any': ['a', {'all': ['b', 'c']}]}},
    {'after': {'atLeast': 2, 'of': ['a', {'any': ['b', 'c']}, ['d', 'e']]}},
    {'after': {'trigger': 'a'}},
    {'after': ['a', {'trigger': 'a', 'as': 'b', 'times': 3}]},
    {'after': [{'trigger': 'a', 'where': None, 'as': None, 'times': None}]},
    {'after': [{'trigger': 'a', 'times': {'$kwarg': ['b', 'n']}}]},
    {'after': ['t_a:failed', 'sessionFinalized', 'höhe: 3']},
    {'after': None, 'andEvery': 'a'},
    {'after': [], 'andEvery': 't_a:expired', 'unless': []},
    {'after': [], 'and_every': 'a'},
    {'after': ['a'], 'andEvery': None, 'unless': None, 'withParams': None, 'using': None,
     'within': None},
    {'after': ['a'], 'unless': {'any': ['b', {'trigger': 'c', 'times': 2}]}},
    {'after': ['a'], 'withParams': {}, 'using': 'threading', 'within': 0.5},
    {'after': ['a'], 'withParams': {'a': {'n': [1, None, {'deep': {}}]}, 'b': {}}},
    {'after': ['a'], 'within': MOST_SECONDS},
    {'after': ['a'], 'priority': {'level': 3}, 'note': None},
    {'after': ['a'], 'run': {'task': 'x'}},
    {'after': ['a'], 'run': {
        'task': 'x', 'args': [1, {'$kwarg': ['a', 'n']}], 'kwargs': {'b': [{'c': None}]},
        'options': {'queue': 'q', 'countdown': 3, 'eta': None}, 'subtask_type': None,
        'immutable': True, 'chord_size': None,
    }},
    {'after': ['a'], 'run': {'task': 'celery.chain', 'subtask_type': 'chain', 'kwargs': {
        'tasks': [{'task': 'x', 'args': [{'$kwarg': ['a', 'n']}]}, GATE],
    }}},
    {'after': ['a'], 'run': {**GATE, 'args': [{'$kwarg': 7}]}},
    {'after': ['a'], 'run': {'task': 'x', 'kwargs': {'$kwarg': ['a', 'all']}}},
]


@pytest.mark.parametrize('directives', ACCEPTED, ids=json.dumps)
def test_what_the_code_accepts_is_valid_and_so_is_what_it_writes(
    directives: dict[str, Any]
) -> None:
    directives = {'run': 'x', **directives}
    written = parse_task('t_x', directives).to_json()
    VALIDATOR.validate({'t_x': directives})
    VALIDATOR.validate({'t_x': written})


@pytest.mark.parametrize(
    'condition',
    [any_of('a', all_of('b', 'c')), at_least(2, 'a', 'b', any_of('c', 'd')), any_of('a') & 'b',
     On('a', named='b', times=3), on('a', times=kwarg('b', 'n')) | 'c'],
    ids=str,
)
def test_what_is_written_of_conditions_in_python_is_valid(condition: Any) -> None:
    written = parse_task('t_x', {'run': 'x', 'after': condition, 'unless': condition}).to_json()
    VALIDATOR.validate({'t_x': written})


def test_a_filter_is_a_text_of_limited_length() -> None:
    for length in (1, MOST_CHARACTERS, MOST_CHARACTERS + 1):
        leaf = {'trigger': 'a', 'where': 'n' * length}
        assert is_valid({'run': 'x', 'after': [leaf]}) == (length <= MOST_CHARACTERS)


#: What the code refuses for reasons that no schema can state.
INEXPRESSIBLE: list[dict[str, Any]] = [
    {'after': {'atLeast': 3, 'of': ['a', 'b']}},
    {'after': {'atLeast': 2, 'of': ['a', 'a']}},
    {'after': ['a', {'trigger': 'a', 'times': 2}]},
    {'after': ['a'], 'unless': [{'trigger': 'b', 'as': 'a'}]},
    {'after': [{'trigger': 'a', 'times': {'$kwarg': ['a', 'n']}}]},
    {'after': [
        {'trigger': 'a', 'times': {'$kwarg': ['b', 'n']}},
        {'trigger': 'b', 'times': {'$kwarg': ['a', 'n']}},
    ]},
    {'after': [{'trigger': 'a', 'where': 'n >'}]},
    {'andEvery': 'a', 'and_every': 'a'},
    {'after': ['a'], 'unles': ['b']},
    {'after': ['a'], 'andevery': 'b'},
    {'after': ['a'], 'and-every': 'b'},
    {'after': ['a'], 'withParam': {}},
]


def refused_directives() -> Iterator[dict[str, Any]]:
    """Yield what the tests of configurations know to be wrong, as far as JSON can say it."""
    table = test_configuration.test_a_malformed_directive_is_named_with_its_mend.pytestmark[0]
    for directives, *_ in table.args[1]:
        try:
            json.dumps(directives, allow_nan=False)
        except (TypeError, ValueError):
            continue
        yield directives


REFUSED: list[dict[str, Any]] = [
    *refused_directives(),
    {'andEvery': None},
    {'after': None},
    {'after': [{'trigger': 'a', 'where': ' '}]},
    {'after': [{'trigger': 'a', 'times': {'$kwarg': ['b', 'n', 'm']}}]},
    {'after': [{'trigger': 'a', 'times': {'$kwarg': ['b', 'n'], 'or': 1}}]},
    {'after': {'of': ['a']}},
    {'after': {}},
    {'after': ['a'], 'within': MOST_SECONDS * 2},
    {'after': ['a'], 'using': ''},
    {'after': ['a'], 'run': ''},
    {'after': ['a'], 'run': {}},
    {'after': ['a'], 'run': {'task': ''}},
    {'after': ['a'], 'run': {'task': 'x', 'arguments': []}},
    {'after': ['a'], 'run': {'task': 'x', 'args': {}}},
    {'after': ['a'], 'run': {'task': 'x', 'kwargs': None}},
    {'after': ['a'], 'run': {'task': 'x', 'immutable': None}},
    {'after': ['a'], 'run': {'task': 'x', 'subtask_type': 'quartet'}},
    {'after': ['a'], 'run': {'task': 'x', 'options': {'eta': '2030-01-01'}}},
    {'after': ['a'], 'run': {'task': 'x', 'options': {'countdown': True}}},
    {'after': ['a'], 'run': {'task': 'x', 'args': [[{'$kwarg': ['a']}]]}},
    {'after': ['a'], 'run': {'task': 'x', 'kwargs': {'b': {'c': {'$kwarg': 'a'}}}}},
]


@pytest.mark.parametrize('directives', REFUSED, ids=json.dumps)
def test_what_is_malformed_is_invalid(directives: dict[str, Any]) -> None:
    written = {'run': 'x', **directives}
    assert not is_accepted(written)
    assert is_valid(written) == (directives in INEXPRESSIBLE)


@pytest.mark.parametrize('name', ['', *(f't_x:{outcome}' for outcome in OUTCOMES)])
def test_a_name_that_no_trigger_task_can_have_is_invalid(name: str) -> None:
    assert not is_valid({'run': 'x', 'after': ['a']}, name)


@pytest.mark.parametrize('name', ['t_x', 'x', 'failed', 't:failed:x', 't_failed', ':'])
def test_a_name_that_a_trigger_task_can_have_is_valid(name: str) -> None:
    assert parse_task(name, {'run': 'x', 'after': ['a']}).name == name
    assert is_valid({'run': 'x', 'after': ['a']}, name)


@pytest.mark.parametrize('value', [None, [], 'text', 7])
def test_directives_and_configurations_are_objects(value: Any) -> None:
    assert not is_valid(value)
    assert not VALIDATOR.is_valid(value)


def test_a_file_may_say_where_its_schema_is() -> None:
    assert VALIDATOR.is_valid({'$schema': 'schema.json', 't_x': {'run': 'x', 'after': ['a']}})
    assert not VALIDATOR.is_valid({'$schema': {'run': 'x', 'after': ['a']}})


names = st.sampled_from(['a', 'b', 'c', 't_a', 't_a:failed']) | st.text('xé:', min_size=1)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([0.5, '']) | names,
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(names | st.sampled_from(['any', 'trigger', '$kwarg']), inner, max_size=2),
    max_leaves=4,
)

placeholders = st.fixed_dictionaries({'$kwarg': st.tuples(names, names).map(list)})

leaves = st.fixed_dictionaries(
    {'trigger': names},
    optional={'as': names, 'times': st.integers(1, 3) | placeholders},
)


def branches(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(members, min_size=1, max_size=3)
    return (
        several
        | several.map(lambda m: {'any': m})
        | several.map(lambda m: {'all': m})
        | st.builds(lambda n, m: {'atLeast': n, 'of': m}, st.integers(1, 2), several)
    )


conditions = branches(st.recursive(names | leaves, branches, max_leaves=4)) | leaves

arguments = st.recursive(
    st.integers() | st.just({'$kwarg': ['a', 'n']}) | st.just(GATE),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)

signatures = st.fixed_dictionaries(
    {'task': names},
    optional={
        'args': st.lists(arguments, max_size=2),
        'kwargs': st.dictionaries(names, arguments, max_size=2),
        'options': st.fixed_dictionaries({}, optional={
            'eta': st.none(), 'countdown': st.integers() | st.none(), 'queue': names,
        }),
        'subtask_type': st.sampled_from([None, *sorted(calls.CANVASES)]),
        'immutable': st.booleans(),
        'chord_size': st.integers() | st.none(),
    },
)

well_formed = st.fixed_dictionaries(
    {
        'run': names | signatures,
        'after': conditions,
        # For the placeholders of signatures, which look at it.
        'withParams': st.dictionaries(
            names, st.dictionaries(names, json_values, max_size=1), max_size=2
        ).map(lambda params: {'a': {}, **params}),
    },
    optional={
        'unless': conditions | st.none(),
        'andEvery': names,
        'using': names,
        'within': st.floats(0, MOST_SECONDS, exclude_min=True) | st.none(),
        'note': json_values,
    },
)

with_something_else = st.builds(
    lambda directives, name, value: {**directives, name: value},
    well_formed, st.sampled_from([*DIRECTIVES, *DIRECTIVES.values()]), json_values | arguments,
)


@settings(deadline=None, derandomize=True, database=None)
@given(well_formed | with_something_else)
def test_whatever_the_code_accepts_is_valid_and_so_is_what_it_writes(directives: Any) -> None:
    try:
        config = parse_task('t_x', directives)
    except InvalidConfiguration:
        return
    VALIDATOR.validate({'t_x': directives})
    VALIDATOR.validate({'t_x': config.to_json()})
