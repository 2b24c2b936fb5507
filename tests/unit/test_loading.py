"""Configurations in files: the same in each format, and errors that say where."""

from __future__ import annotations

import json
import sys
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_triggers.engine.configuration import Configuration
from celery_triggers.exceptions import InvalidConfiguration, MissingExtra
from celery_triggers.loading import configuration_in, load_configuration
from celery_triggers.loading.in_json import read_json
from celery_triggers.task.workflow import Workflows

WHOLE = {
    't_ship': {
        'after': ['paid', {'any': ['packed', 'downloaded']}],
        'unless': {'atLeast': 2, 'of': ['cancelled', 'refunded', 't_check:failed']},
        'run': 'shop.ship',
        'withParams': {'packed': {'box': 'A "4"\n', 'sizes': [1, 2.5, {'deep': True}]}},
        'within': 3600,
    },
    't_höhe 1.5': {
        'andEvery': 'measured',
        'after': [{'trigger': 'uploaded', 'times': {'$kwarg': ['closed', 'count']}}],
        'run': {'task': 'shop.measure', 'kwargs': {'n': {'$kwarg': ['measured', 'n']}}},
    },
}

IN_TOML = '''
t_ship.run = "shop.ship"  # dotted keys open a table, too
t_ship.within = 3600
t_ship.after = [
    "paid",
    {any = ["packed", "downloaded"]},
]

[t_ship.unless]
atLeast = 2
of = ["cancelled", "refunded", 't_check:failed']

[t_ship.withParams]
packed.box = """
A "4"
"""
packed.sizes = [1, 2.5, {deep = true}]

["t_höhe 1.5"]
andEvery = 'measured'
run = {task = "shop.measure", kwargs = {n = {"$kwarg" = ["measured", "n"]}}}
[["t_höhe 1.5".after]]
trigger = 'uploaded'
times = {"$kwarg" = ["closed", "count"]}
'''

IN_YAML = """
t_ship:
  after: [paid, any: &either [packed, downloaded]]
  unless:
    atLeast: 2
    of:
    - cancelled
    - refunded
    - t_check:failed
  run: shop.ship
  withParams:
    packed:
      box: |
        A "4"
      sizes: [1, 2.5, deep: true]
  within: 3600
t_höhe 1.5:
  andEvery: measured
  after:
  - {trigger: uploaded, times: {$kwarg: [closed, count]}}
  run:
    task: shop.measure
    kwargs: {n: {$kwarg: [measured, n]}}
"""


def write(folder: Path, suffix: str, text: str) -> Path:
    path = folder / f'workflow{suffix}'
    path.write_text(text, encoding='utf-8')
    return path


@pytest.mark.parametrize(
    ('suffix', 'text'),
    [
        ('.json', json.dumps(WHOLE)),
        ('.JSON', json.dumps(WHOLE, indent=2, ensure_ascii=False)),
        ('.json', json.dumps({'$schema': './schema.json', **WHOLE}, indent='\t')),
        ('.json', '\ufeff\r\n' + json.dumps(WHOLE, indent=2).replace('\n', '\r\n')),
        ('.toml', IN_TOML),
        ('.toml', IN_TOML.replace('\n', '\r\n')),
        ('.yaml', IN_YAML),
        ('.yml', IN_YAML.replace('\n', '\r\n')),
        ('.yaml', json.dumps(WHOLE, indent=2)),
    ],
)
def test_each_format_gives_the_same_configuration(tmp_path: Path, suffix: str, text: str) -> None:
    loaded = load_configuration(write(tmp_path, suffix, text))
    assert loaded.digest == Configuration.parse(WHOLE).digest


#: What is wrong in a text, with its line, trigger task, directive, and words of the message.
WRONG: dict[str, list[tuple[str, int | None, str | None, str | None, str]]] = {
    '.json': [
        ('[]', 1, None, None, 'maps the names'),
        ('\n\n"t_x"', 3, None, None, 'maps the names'),
        ('{"t_x":\n7}', 1, 't_x', None, 'directives are a mapping'),
        ('{\n"t_x:failed": {"after": ["a"], "run": "x"}}', 2, 't_x:failed', None, 'outcome'),
        ('{\n"t_x": {"run":\n"x"}}', 2, 't_x', 'after', 'can never run'),
        ('{"t_x": {\n"after":\n["a"]}}', 1, 't_x', 'run', 'Celery task'),
        ('{"t_x": {\n"after": ["a"],\n"run": 7}}', 3, 't_x', 'run', 'Celery task'),
        ('{"t_x": {"run": "x",\n\n"after"\n: 7}}', 3, 't_x', 'after', 'a condition is'),
        ('{"t_x": {"run": "x", "after": [\n"a",\n7]}}', 3, 't_x', 'after', 'not int: 7'),
        (
            '{"t_x": {"run": "x", "after": ["a"],\n"unless": {\n"any": [\n"b", {\n"all": [["c"],'
            '\n{"trigger": "d",\n"times": 0}]}]}}}',
            6, 't_x', 'unless', 'from 1 on',
        ),
        (
            '{"t_x": {"run": "x", "after": [\n"a",\n{"any":\n["b",\n[]]}]}}',
            5, 't_x', 'after', 'must not be empty',
        ),
        (
            '{"t_x": {"run": "x", "after": [\n"a",\n{"atLeast": 3, "of": [\n"b"]}]}}',
            3, 't_x', 'after', 'from 1 to 1',
        ),
        (
            '{"t_x": {"run": "x",\n"after": [\n"a",\n{"trigger": "a", "times": 2}]}}',
            2, 't_x', 'after', 'received as',
        ),
        (
            '{"t_x": {"run": "x", "after": ["a"],\n"and_every": 7}}',
            2, 't_x', 'andEvery', 'one trigger name',
        ),
        (
            '{"t_x": {"run": "x", "after": ["a"],\n"andEvery": "a",\n"and_every": "a"}}',
            3, 't_x', 'and_every', 'given twice',
        ),
        ('{"t_x": {"run": "x",\n"aftr": ["a"]}}', 2, 't_x', 'aftr', 'did you mean'),
        ('{"t_x": {"after": ["a"], "run": "x",\n"note": NaN}}', 1, 't_x', None, 'JSON alone'),
        (
            '{"t_x": {"after": ["t_y:abandoned"], "unless": ["t_y:abandoned"], "run": "x"},\n'
            '"t_y": {"after": ["a"], "unless": ["t_x:abandoned"], "run": "x"}}',
            1, 't_x', None, 't_x -> t_y -> t_x',
        ),
    ],
    '.toml': [
        ('\n[t_x]\nrun = "x"', 2, 't_x', 'after', 'can never run'),
        ('[t_y]\nrun="x"\nafter=["a"]\n[t_x]', 4, 't_x', 'run', 'Celery task'),
        ('t_x = 7', 1, 't_x', None, 'directives are a mapping'),
        ('# one\n[t_x]\n\n# two\nafter = "paid"\nrun = "x"', 5, 't_x', 'after', 'write'),
        ('[t_x]\nrun = "x"\nafter = [\n"a",\n7]', 3, 't_x', 'after', 'not int: 7'),
        ('t_x.run = "x"\nt_x."after" = [7]', 2, 't_x', 'after', 'not int: 7'),
        ('["t_x"]\nrun = \'\'\'\nx\'\'\'\n"unless" = 7', 4, 't_x', 'unless', 'a condition is'),
        ('\nt_x = {run = "x", after = ["a"], within = 0}', 2, 't_x', 'within', 'seconds'),
        ('[t_x]\nrun = "x"\n\n[t_x.after]\nany = []', 4, 't_x', 'after', 'at least one'),
        (
            '[t_x]\nrun = "x"\n[[t_x.after]]\ntrigger = "a"\n[[t_x.after]]\ntrigger = "b"\n'
            'times = 0',
            5, 't_x', 'after', 'from 1 on',
        ),
        (
            '[t_x]\nrun = "x"\n[[t_x.after]]\nany = ["b"]\n[[t_x.after]]\nany = ["a"]\n'
            '[[t_x.unless]]\n[[t_x.unless.any]]\ntrigger = "c"\n[[t_x.unless.any]]\ntrigger = ""',
            10, 't_x', 'unless', 'must not be empty',
        ),
        (
            '[t_x]\nrun = "x"\nafter = ["a"]\nwithin = 2030-01-01',
            4, 't_x', 'within', 'seconds',
        ),
        (
            '[t_x]\nrun = "x"\nafter = ["a"]\n[t_x.withParams.a]\nat = 2030-01-01',
            4, 't_x', 'withParams', 'JSON alone',
        ),
    ],
    '.yaml': [
        ('', None, None, None, 'maps the names'),
        ('- t_x', 1, None, None, 'maps the names'),
        ('# one\n\nt_x:', 3, 't_x', None, 'directives are a mapping'),
        ('t_x:\n  run: x', 1, 't_x', 'after', 'can never run'),
        ('t_x:\n  after: [a]', 1, 't_x', 'run', 'Celery task'),
        ('t_x:\n  run: x\n  after: paid', 3, 't_x', 'after', 'write'),
        ('t_x:\n  run: x\n  after:\n  - a\n  - no', 5, 't_x', 'after', 'not bool: False'),
        (
            't_x:\n  run: x\n  after: [a]\n  unless:\n    any:\n    - b\n    -\n      - c\n      -'
            ' all: [d,\n          triger: e]',
            10, 't_x', 'unless', 'no condition',
        ),
        (
            't_y: &y\n  after: [a]\n  run: x\nt_x:\n  <<: *y\n  within: 0',
            6, 't_x', 'within', 'seconds',
        ),
        ('t_x:\n  run: x\n  after: [a]\n  within: 2030-01-01', 4, 't_x', 'within', 'seconds'),
        (
            't_x:\n  run: x\n  after: [a]\n  withParams: {a: {at: 2030-01-01}}',
            4, 't_x', 'withParams', 'JSON alone',
        ),
        ('t_x:\n  run: x\n  aftr: [a]', 3, 't_x', 'aftr', 'did you mean'),
    ],
}


@pytest.mark.parametrize(
    ('suffix', 'text', 'line', 'task', 'directive', 'words'),
    [(suffix, *row) for suffix, rows in WRONG.items() for row in rows],
)
def test_an_error_names_the_file_the_line_and_the_directive(
    tmp_path: Path,
    suffix: str,
    text: str,
    line: int | None,
    task: str | None,
    directive: str | None,
    words: str,
) -> None:
    path = write(tmp_path, suffix, text)
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        load_configuration(path)
    error = caught.value
    assert (error.task, error.directive) == (task, directive)
    assert (error.file, error.line) == (str(path), line)
    assert str(error).startswith(f'{path}:{line}: ' if line else f'{path}: ')


def test_the_message_reads_as_that_of_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, '.yaml', 't_x:\n  run: x\n  within: 0').parent)
    with pytest.raises(InvalidConfiguration) as caught:
        load_configuration('workflow.yaml')
    assert str(caught.value).startswith(
        "workflow.yaml:3: trigger task 't_x': directive 'within': a number of seconds is wanted"
    )


@pytest.mark.parametrize(
    ('suffix', 'text', 'line', 'words'),
    [
        ('.json', '', 1, 'Expecting value'),
        ('.json', '\n{"t_x": {"run": "x",\n}}', 3, 'key in double quotes'),
        ('.json', '{"t_x": {"after": ["a",\n]}}', 2, 'Expecting value'),
        ('.json', '{"t_x"\n"run"}', 2, "Expecting ':'"),
        ('.json', '{"t_x": {"after": ["a"\n"b"]}}', 2, r"Expecting ',' or '\]' \(column 1\)"),
        ('.json', '{"t_x": {"run": "x"\n"after": []}}', 2, "Expecting ',' or '}'"),
        ('.json', '{"t_x": "a\nb"}', 1, 'control character'),
        ('.json', '{\n', 2, 'key in double quotes'),
        ('.json', '{"t_x": tru\n}', 1, 'Expecting value'),
        ('.json', '{}\n{}', 2, 'Extra data'),
        ('.toml', 'a = 1\nb = \n', 2, r'Invalid value \(column 5\)'),
        ('.toml', '[t_x]\nafter = [\n"a",\n', 3, 'Invalid value .at end of document'),
        ('.toml', 'a = """\n\n', 1, 'Unterminated string'),
        ('.yaml', 't_x:\n  after: [a\n  run: x', 3, r'flow sequence, expected .* \(column 6\)'),
        ('.yaml', 't_x:\n\trun: x', 2, 'cannot start any token'),
        ('.yaml', 't_x: {}\n---\nt_y: {}', 2, 'single document'),
        ('.yaml', 't_x: *y', 1, 'undefined alias'),
        ('.yaml', 't_x:\n  run: !!python/name:os.system x', 2, 'could not determine'),
        ('.yaml', 't_x:\n  run: \x00', 2, 'not allowed'),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_at_its_line(
    tmp_path: Path, suffix: str, text: str, line: int, words: str
) -> None:
    path = write(tmp_path, suffix, text)
    said = f'cannot be read as {suffix[1:].upper()}: .*{words}'
    with pytest.raises(InvalidConfiguration, match=said) as caught:
        load_configuration(path)
    assert (caught.value.file, caught.value.line) == (str(path), line)


@pytest.mark.parametrize(
    ('suffix', 'text', 'line', 'names', 'words'),
    [
        ('.json', '{"t_x": {},\n\n"t_x": {}}', 3, ('t_x', None), "key 't_x' .* on line 1"),
        ('.json', '{"t_x": {\n"run": "x",\n"run": "y"}}', 3, ('t_x', 'run'), 'first on line 2'),
        ('.json', '{"t_x": {"run": "x",\n"r\\u0075n": "y"}}', 2, ('t_x', 'run'), "key 'run'"),
        (
            '.json', '{"t_x": {"after": ["a", {"any": ["b"],\n"any": ["c"]}]}}', 2,
            ('t_x', 'after'), "key 'any'",
        ),
        (
            '.json', '{"t_x": {"withParams": {"a": {\n"n": 1,\n"n": 1}}}}', 3,
            ('t_x', 'withParams'), "key 'n' .* on line 2",
        ),
        ('.json', '[[{"a": 1, "a": 2}]]', 1, (None, None), "key 'a'"),
        ('.yaml', 't_x:\n  run: x\nt_x:\n  run: y', 3, ('t_x', None), "'t_x' .* on line 1"),
        ('.yaml', 't_x:\n  run: x\n  "run": y', 3, ('t_x', 'run'), 'first on line 2'),
        ('.yaml', 't_x: {after: [{any: [a],\nany: [b]}]}', 2, ('t_x', 'after'), "key 'any'"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(
    tmp_path: Path, suffix: str, text: str, line: int, names: tuple[Any, Any], words: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        load_configuration(write(tmp_path, suffix, text))
    assert caught.value.line == line
    assert (caught.value.task, caught.value.directive) == names


def test_toml_itself_refuses_a_key_that_is_given_twice(tmp_path: Path) -> None:
    for text in ('[t_x]\nrun = "x"\nrun = "y"', 't_x.run = "x"\nt_y = {}\n[t_x]'):
        with pytest.raises(InvalidConfiguration, match='TOML: Cannot') as caught:
            load_configuration(write(tmp_path, '.toml', text))
        assert caught.value.line == 3


@pytest.mark.parametrize(
    ('text', 'line', 'words'),
    [
        ('t_x:\n  run: x\n  on: [a]', 3, "write 'on' in quotes"),
        ('t_x:\n  withParams: {a: {1: b}}', 2, "write '1' in quotes"),
        ('? [t_x]\n: {run: x}', 1, 'not a sequence'),
        ('t_x:\n  after: &after\n  - a\n  - *after', 2, 'must not contain itself'),
    ],
)
def test_what_yaml_can_say_and_json_cannot_is_refused(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        load_configuration(write(tmp_path, '.yaml', text))
    assert caught.value.line == line


def test_members_of_a_yaml_mapping_may_come_from_another(tmp_path: Path) -> None:
    text = 't_x: &x {run: x, after: [a]}\nt_y:\n  <<: *x\n  run: y'
    loaded = load_configuration(write(tmp_path, '.yaml', text))
    assert (list(loaded['t_y'].after), loaded['t_y'].run) == (['a'], 'y')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)

#: JSON texts, mostly with one character too many.
json_texts = st.builds(
    lambda value, indent, at, char: (
        (text := json.dumps(value, indent=indent))[: at % len(text)] + char + text[at % len(text) :]
    ),
    json_values, st.none() | st.just(1), st.integers(0), st.sampled_from(['', *'{}[]",:0-\\ \n\t']),
)


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(json_texts)
def test_json_is_what_the_standard_library_takes_for_it(text: str) -> None:
    try:
        expected = json.loads(text, object_pairs_hook=_object)
    except (JSONDecodeError, KeyError):
        with pytest.raises(InvalidConfiguration) as caught:
            read_json(text)
        assert caught.value.line is not None
    else:
        assert read_json(text).content == expected


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise KeyError
    return dict(pairs)


@settings(deadline=None, derandomize=True, database=None)
@given(json_values)
def test_in_indented_json_each_value_has_a_line_of_its_own(value: Any) -> None:
    text = json.dumps(value, indent=1)
    lines = read_json(text).lines
    assert len(set(lines.values())) == len(lines)
    for path, line in lines.items():
        written = text.split('\n')[line - 1].strip()
        if path and isinstance(path[-1], str):
            assert written.startswith(json.dumps(path[-1]) + ':')


@pytest.mark.parametrize(
    ('suffix', 'text', 'words'),
    [
        ('.json', '[' * 100_000, 'nested too deeply'),
        ('.json', f'{{"t_x": {{"after": {"[" * 300}{"]" * 300}}}}}', 'nested too deeply'),
        ('.yaml', '[' * 10_000, 'nested too deeply'),
        ('.json', f'{{"t_x": {"7" * 10_000}}}', 'digits'),
        ('.yaml', 't_x: 2030-02-30', 'day is out of range'),
    ],
)
def test_what_the_libraries_give_up_on_is_refused_too(
    tmp_path: Path, suffix: str, text: str, words: str
) -> None:
    path = write(tmp_path, suffix, text)
    with pytest.raises(InvalidConfiguration, match=words) as caught:
        load_configuration(path)
    assert (caught.value.file, caught.value.line) == (str(path), None)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r'missing\.json: .*No such file'):
        load_configuration(tmp_path / 'missing.json')
    (tmp_path / 'folder.yaml').mkdir()
    with pytest.raises(InvalidConfiguration, match=r'folder\.yaml: .*directory'):
        load_configuration(tmp_path / 'folder.yaml')


def test_a_file_is_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / 'latin.yaml'
    path.write_bytes('t_x:\n  run: höhe'.encode('latin-1'))
    with pytest.raises(InvalidConfiguration, match=r'latin\.yaml:2: .*UTF-8'):
        load_configuration(path)


@pytest.mark.parametrize('name', ['workflow.ini', 'workflow', '.json', 'workflow.json.bak'])
def test_a_suffix_that_tells_no_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{}')
    with pytest.raises(InvalidConfiguration, match=r'\.json, \.toml, \.yaml, \.yml'):
        load_configuration(tmp_path / name)


@pytest.mark.parametrize('text', ['{}', '{"$schema": "schema.json"}'])
def test_a_file_without_trigger_tasks_is_an_empty_configuration(tmp_path: Path, text: str) -> None:
    assert not load_configuration(write(tmp_path, '.json', text))
    assert not load_configuration(write(tmp_path, '.toml', ''))


@pytest.mark.parametrize(
    ('suffix', 'library'),
    [('.yaml', 'yaml'), ('.toml', 'tomllib' if sys.version_info >= (3, 11) else 'tomli')],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'celery_triggers\[{suffix[1:]}\]'"):
        load_configuration(write(tmp_path, suffix, ''))
    assert load_configuration(write(tmp_path, '.json', json.dumps(WHOLE)))


@pytest.mark.parametrize(
    ('task', 'directive', 'line'),
    [('t_y', 'run', 3), ('t_y', 'using', 2), ('t_y', None, 2), ('t_other', 'run', 1)],
)
def test_what_is_said_later_against_a_file_has_its_line_too(
    tmp_path: Path, task: str, directive: str | None, line: int
) -> None:
    path = write(tmp_path, '.json', '{"t_x": {},\n"t_y": {"after": ["a"],\n"run": "x"}}')

    def refuse() -> None:
        with configuration_in(path) as content:
            assert content == {'t_x': {}, 't_y': {'after': ['a'], 'run': 'x'}}
            raise InvalidConfiguration('it is taken', task=task, directive=directive)

    with pytest.raises(InvalidConfiguration, match=f'workflow.json:{line}: .*taken') as caught:
        refuse()
    assert caught.value.line == line


def test_nothing_of_a_wrong_file_is_configured(tmp_path: Path) -> None:
    workflows = Workflows()
    path = write(tmp_path, '.json', json.dumps({**WHOLE, 't_x': {'run': 'x'}}))
    with pytest.raises(InvalidConfiguration, match="'t_x'"):
        workflows.add('', load_configuration(path))
    with pytest.raises(InvalidConfiguration, match="'t_x'"), configuration_in(path) as content:
        workflows.add('', content)
    assert not workflows.for_uid('order:1')
