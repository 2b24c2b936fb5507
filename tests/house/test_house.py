"""The tree shows the architecture: few modules at the top, no circles, nothing large."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house.picture import drawn, floors, picture, reached, reduced
from tests.parts.imports import PACKAGE, ROOT, circles, imports_of, modules, room_of, rooms

MOST_AT_THE_TOP = 8
MOST_LINES = 500
MOST_LINES_OF_A_FUNCTION = 60

#: What is not held to these sizes: tests, and what Django has written.
ASIDE = ('testing/conformance/', 'contrib/django/migrations/')


def sources() -> list[Path]:
    return [
        path for path in sorted(PACKAGE.rglob('*.py'))
        if not path.relative_to(PACKAGE).as_posix().startswith(ASIDE)
    ]


def test_few_modules_stand_at_the_top() -> None:
    top = {path.stem for path in PACKAGE.glob('*.py')} - {'__init__'}
    assert len(top) <= MOST_AT_THE_TOP, sorted(top)


@pytest.mark.parametrize('package', ['celery_triggers', 'benchmarks', 'examples'])
def test_no_imports_go_in_circles(package: str) -> None:
    # Whatever they are for: type checkers' and late ones count.
    assert circles(imports_of(ROOT / package)) == []


def test_circles_are_found() -> None:
    assert circles({'a': ['b'], 'b': ['c'], 'c': ['a', 'd'], 'd': []}) == [['a', 'b', 'c']]


def test_no_module_is_large() -> None:
    large = {
        str(path.relative_to(PACKAGE)): lines for path in sources()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not large


def test_no_function_is_large() -> None:
    large = {
        f'{path.relative_to(PACKAGE)}:{node.name}': lines
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert not large


@pytest.mark.parametrize('room', sorted({
    path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('__init__.py')
    if path.parent != PACKAGE and 'migrations' not in path.parts and 'conformance' not in path.parts
}))
def test_each_room_says_what_it_is_for_and_what_it_may_import(room: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / room / '__init__.py').read_text())) or ''
    assert re.match(r'[A-Z`]', said)
    assert re.search(r'^May import ', said, flags=re.MULTILINE)


# ------------------------------------------------------------------ ARCHITECTURE.md


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    assert drawn() == picture(), 'python -m tests.house.picture draws it'


def test_the_picture_leaves_out_what_follows_from_it_alone() -> None:
    edges = rooms()
    left = reduced(edges)
    assert all(reached(left, name) == reached(edges, name) for name in edges)


def test_every_room_stands_on_a_floor_and_imports_lower_ones() -> None:
    number = {room: floor for floor, names in enumerate(floors()) for room in names}
    assert set(number) == {room_of(module) for module in modules()} - {''}
    for room, others in rooms().items():
        assert all(number[other] > number[room] for other in others), room


@pytest.mark.parametrize('page', ['ARCHITECTURE.md', 'CONTRIBUTING.md', 'tests/README.md'])
def test_what_the_pages_name_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r'`((?:celery_triggers|tests|docs|benchmarks|examples)/[\w./-]+)`', text)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
