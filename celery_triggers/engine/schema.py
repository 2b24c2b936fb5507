"""A JSON Schema of configurations, made of the tables by which the code reads them.

It is for editors and other programs, and describes the JSON names. What it refuses, the code
refuses too. The code refuses more: what one value says of another, such as two leaves that
share a key, and directives that are nearly one of those known.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from celery_triggers.engine import calls
from celery_triggers.engine.configuration import MOST_SECONDS
from celery_triggers.engine.filters import MOST_CHARACTERS
from celery_triggers.engine.names import OUTCOMES
from celery_triggers.engine.task_config import DIRECTIVES, TaskConfig

__all__ = ['configuration_schema']

Schema = dict[str, Any]

_NULL: Schema = {'type': 'null'}


def _ref(name: str) -> Schema:
    return {'$ref': f'#/$defs/{name}'}


def _optional(schema: Schema) -> Schema:
    return {'anyOf': [schema, _NULL]}


def _said(description: str, schema: Schema) -> Schema:
    return {'description': description, **schema}


def _closed(required: Schema, optional: Mapping[str, Schema] | None = None) -> Schema:
    """Return the schema of an object that has these members and no others."""
    return {
        'type': 'object',
        'properties': {**required, **(optional or {})},
        'required': list(required),
        'additionalProperties': False,
    }


#: What a directive may be, by its name in JSON.
_VALUES: dict[str, Schema] = {
    'after': _ref('condition'),
    'andEvery': _ref('name'),
    'unless': _ref('condition'),
    'run': {'anyOf': [_ref('name'), _ref('signature')]},
    'withParams': {'type': 'object', 'additionalProperties': {'type': 'object'}},
    'using': _ref('name'),
    'within': {'type': 'number', 'exclusiveMinimum': 0, 'maximum': MOST_SECONDS},
}

_JSON_TYPES: dict[type, str] = {
    list: 'array', tuple: 'array', Mapping: 'object', str: 'string', bool: 'boolean',
    int: 'integer', type(None): 'null',
}

#: What a member of a signature must be besides its type.
_NARROWER: dict[str, Schema] = {
    'subtask_type': {'enum': [None, *sorted(calls.CANVASES)]},
    'options': {'properties': {'eta': _NULL, 'countdown': {'type': ['number', 'null']}}},
}


def configuration_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of ``{name of a trigger task: directives}``."""
    ends = '|'.join(OUTCOMES)
    schema = {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'A configuration of celery_triggers',
        'description': 'Trigger tasks by name: when to run what.',
        'type': 'object',
        'properties': {'$schema': {'type': 'string'}},
        'propertyNames': {'minLength': 1, 'not': {'pattern': f':({ends})$'}},
        'additionalProperties': _ref('task'),
        '$defs': {
            'task': _task(),
            'name': {'type': 'string', 'minLength': 1},
            **_conditions(),
            'signature': _signature(),
            'argument': _argument(),
        },
    }
    # The caller may change it, and the tables above are in it.
    return deepcopy(schema)


def _task() -> Schema:
    needed = [
        field.name for field in dataclasses.fields(TaskConfig)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    said = _descriptions()
    properties: Schema = {}
    for name, python_name in DIRECTIVES.items():
        value = _VALUES[name] if python_name in needed else _optional(_VALUES[name])
        properties[name] = _said(said.get(python_name, ''), value)
    return {
        'type': 'object',
        'properties': properties,
        'required': [name for name, python_name in DIRECTIVES.items() if python_name in needed],
        'anyOf': _reasons_to_run(),
    }


def _reasons_to_run() -> list[Schema]:
    """Return what a trigger task must have one of: without them nothing asks for it."""
    return [
        {'required': ['after'], 'properties': {'after': {'not': {'enum': [None, []]}}}},
        {'required': ['andEvery'], 'properties': {'andEvery': {'not': _NULL}}},
        # Not described, and yet read.
        {'required': [DIRECTIVES['andEvery']]},
    ]


def _descriptions() -> dict[str, str]:
    """Return what the docstring of a trigger task says of its attributes."""
    lines = inspect.getdoc(TaskConfig) or ''
    said = re.findall(r'^    (\w+): (.+(?:\n {8}.+)*)', lines, re.MULTILINE)
    return {name: _unmarked(' '.join(text.split())) for name, text in said}


def _unmarked(text: str) -> str:
    """Return text without the markup of docstrings, its references and Python's ``None``."""
    text = re.sub(r', see :\w+:`[^`]*`', '', text)
    return text.replace('``None``', 'null').replace('``', '')


def _conditions() -> dict[str, Schema]:
    members = {'type': 'array', 'minItems': 1, 'items': _ref('member')}
    return {
        'condition': {
            'description': 'A list (all of them), any/all/atLeast of a list, or one leaf.',
            'anyOf': [
                {'type': 'array', 'items': _ref('member')}, _ref('branch'), _ref('leaf'),
            ],
        },
        'member': {'anyOf': [_ref('name'), members, _ref('branch'), _ref('leaf')]},
        'branch': {
            'anyOf': [
                _closed({'any': members}),
                _closed({'all': members}),
                _closed({'atLeast': {'type': 'integer', 'minimum': 1}, 'of': members}),
            ],
        },
        'leaf': _leaf(),
        'kwarg': _closed({
            '$kwarg': _said('The trigger, or the "as" of its leaf, and the name of a kwarg.', {
                'type': 'array', 'items': _ref('name'), 'minItems': 2, 'maxItems': 2,
            }),
        }),
    }


def _leaf() -> Schema:
    where = {'type': 'string', 'pattern': r'\S', 'maxLength': MOST_CHARACTERS}
    times = {'anyOf': [{'type': 'integer', 'minimum': 1}, _ref('kwarg')]}
    key = 'The key of what is received; the name of the trigger by default.'
    return _closed(
        {'trigger': _said('The name of the trigger.', _ref('name'))},
        {
            'where': _said('An expression in CEL over the kwargs of a firing.', _optional(where)),
            'as': _said(key, _optional(_ref('name'))),
            'times': _said('How many firings the session must have seen.', _optional(times)),
        },
    )


def _signature() -> Schema:
    members = {
        name: {'type': sorted({_JSON_TYPES[kind] for kind in kinds}), **_NARROWER.get(name, {})}
        for name, kinds in calls.KINDS.items()
    }
    # That it may hold placeholders is said of the whole, since a gate's are its own.
    return {
        'description': 'A Celery task with arguments of its own, as Celery serializes it.',
        **_closed({'task': _ref('name')}, members),
        'allOf': [_ref('argument')],
    }


def _argument() -> Schema:
    """Return the schema of a value that may hold placeholders, at any depth."""
    return {
        'if': {'type': 'object', 'required': ['$kwarg']},
        'then': _ref('kwarg'),
        'else': {
            'if': {
                'type': 'object',
                'required': ['subtask_type'],
                'properties': {'subtask_type': {'const': calls.GATE}},
            },
            'else': {'items': _ref('argument'), 'additionalProperties': _ref('argument')},
        },
    }
