"""Runs what stands in the pages: every fenced block, by its language.

``python``   runs; the page's blocks share one namespace.
``pycon``    is a doctest in the same namespace.
``text``     after a ``python`` block is what the blocks since the last one printed. A page
             that prints something and does not show it fails, as does one that shows
             something else. ``...`` stands for anything.
``json``     is a configuration.
``toml``, ``ini``  must parse.
``console``  runs the commands after ``$`` and compares what they print.
``bash``     names commands, make targets, files and options that exist.

A block in another language fails: nobody would check it.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from tests.parts import servers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

#: What the pages call the Redis of their readers, and what the tests use for it.
REDIS_OF_PAGES = 'redis://localhost:6379/0'

#: The same for PostgreSQL; some name the driver.
POSTGRESQL_OF_PAGES = '://localhost/shop'

#: The key prefix of the pages that use it; each run has one of its own instead.
PREFIX_OF_PAGES = 'shop-docs'

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

#: Directives of the pages; what is in them is the documentation's, not code.
DIRECTIVES = {
    'transitions', 'by-hand', 'setting', 'toctree', 'eval-rst', 'glossary', 'image', 'contents',
}


def pages() -> list[Path]:
    """Return every page: the README and what Sphinx builds."""
    found = [p for p in (ROOT / 'docs').rglob('*.md') if '_build' not in p.parts]
    return [ROOT / 'README.md', *sorted(found)]


class Blocks:
    """Parses every fenced block of a page, whatever its language."""

    def __init__(self) -> None:
        self._lexer = FencedCodeBlockLexer(
            language=r'[^\n]*', mapping={'language': 'arguments', 'source': 'source'}
        )

    def __call__(self, document: Document) -> Iterator[Region]:
        for region in self._lexer(document):
            language = region.lexemes['arguments'].strip()
            directive = re.match(r'\{([\w-]+)\}', language)
            if directive and directive[1] in DIRECTIVES:
                continue
            region.parsed = region.lexemes['source']
            region.evaluator = evaluator(language)
            yield region


class UnshownOutput(AssertionError):
    """A page printed something that it does not show."""


def run_page(path: Path, redis_url: str, prefix: str = '') -> None:
    """Run a page.

    Args:
        redis_url: Takes the place of the one that the pages name.
        prefix: Begins the names of all keys that the page makes there.
    """
    document = _document(path)
    # The module that a reader would write: tasks are named shop.<function>.
    document.namespace.update({'__name__': 'shop', ' printed': io.StringIO()})
    for example in document:
        example.namespace.update({' redis': redis_url, ' prefix': prefix})
        _check_nothing_unshown(example)
        example.evaluate()
    rest = document.namespace[' printed'].getvalue()
    if rest:
        raise UnshownOutput(f'{path.name} does not show what its last blocks print:\n{rest}')


def _document(path: Path) -> Document:
    return Sybil([Blocks()], path='.', encoding='utf-8').parse(path)


def parse(path: Path) -> list[Example]:
    """Return the blocks of a page, without running them."""
    return list(_document(path))


def _check_nothing_unshown(example: Example) -> None:
    printed = example.namespace[' printed'].getvalue()
    if printed and example.region.lexemes['arguments'].strip() not in ('python', 'text'):
        raise UnshownOutput(f'{example.path}, line {example.line}: not shown above:\n{printed}')


def evaluator(language: str) -> Any:
    try:
        return EVALUATORS[language]
    except KeyError:
        return _unknown


def _unknown(example: Example) -> None:
    language = example.region.lexemes['arguments']
    raise AssertionError(f'line {example.line}: nobody checks blocks of {language!r}')


def _source(example: Example) -> str:
    url = example.namespace.get(' redis')
    source = str(example.parsed)
    if url is None:
        return source
    prefix = example.namespace[' prefix']
    database = servers.POSTGRESQL.partition(':')[2]
    return (
        source.replace(REDIS_OF_PAGES, url)
        .replace(PREFIX_OF_PAGES, prefix)
        .replace(POSTGRESQL_OF_PAGES, f':{database}')
    )


def run_python(example: Example) -> None:
    line = example.line + example.parsed.line_offset
    code = compile('\n' * line + _source(example), example.path, 'exec', dont_inherit=True)
    with contextlib.redirect_stdout(example.namespace[' printed']):
        exec(code, example.namespace)


def compare_text(example: Example) -> None:
    printed = example.namespace[' printed']
    _compare(example.parsed, printed.getvalue())
    printed.seek(0)
    printed.truncate()


def _compare(shown: str, printed: str) -> None:
    shown, printed = shown.rstrip() + '\n', printed.rstrip() + '\n'
    if not doctest.OutputChecker().check_output(shown, printed, OPTIONS):
        raise AssertionError(f'the page shows:\n{shown}\nbut this is printed:\n{printed}')


def run_pycon(example: Example) -> None:
    test = doctest.DocTestParser().get_doctest(
        _source(example), example.namespace, Path(example.path).name, example.path, example.line
    )
    assert test.examples, 'a pycon block has at least one >>>'
    runner = doctest.DebugRunner(optionflags=OPTIONS)
    runner.run(test, clear_globs=False)
    example.namespace.update(test.globs)


def parse_json(example: Example) -> None:
    from celery_triggers.engine.configuration import Configuration

    Configuration.parse(json.loads(example.parsed))


def parse_toml(example: Example) -> None:
    tomllib.loads(str(example.parsed))


def parse_ini(example: Example) -> None:
    configparser.ConfigParser().read_string(str(example.parsed))


def run_console(example: Example) -> None:
    commands = re.split(r'^\$ ', str(example.parsed), flags=re.MULTILINE)
    assert not commands[0].strip(), 'a console block begins with "$ "'
    for command, _, shown in (part.partition('\n') for part in commands[1:]):
        _compare(shown, run_command(command))


def run_command(command: str) -> str:
    """Run a command as the pages show it, from the project's folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, 'PATH': path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_bash(example: Example) -> None:
    for line in str(example.parsed).replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    """Check that what a command names exists."""
    command, *arguments = words
    if command == 'make':
        assert make_targets() >= set(arguments), f'the Makefile lacks {arguments}'
    elif command == 'pip':
        _check_pip(arguments)
    elif command in ('python', 'pytest'):
        _check_python(command, arguments)
    elif command == 'celery':
        _check_celery(arguments)
    elif command == 'sphinx-build':
        assert (ROOT / 'docs' / 'conf.py').exists()
    else:
        raise AssertionError(f'nobody checks the command {command!r}')


@cache
def make_targets() -> set[str]:
    makefile = (ROOT / 'Makefile').read_text()
    return set(re.findall(r'^([\w-]+):', makefile, flags=re.MULTILINE))


def _check_pip(arguments: list[str]) -> None:
    assert arguments[0] == 'install'
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = set(project['optional-dependencies'])
    for argument in arguments[1:]:
        if argument in ('-e', '-U'):
            continue
        match = re.fullmatch(r'(\.|celery_triggers)(?:\[([\w,]+)\])?', argument)
        assert match, f'pip would install {argument!r}'
        assert set((match[2] or '').split(',')) - {''} <= extras, argument


def _check_python(command: str, arguments: list[str]) -> None:
    if arguments[:2] == ['-m', 'pytest']:
        _check_pytest(arguments[2:])
    elif arguments[:1] == ['-m']:
        module = ROOT.joinpath(*arguments[1].split('.'))
        assert (module / '__main__.py').exists() or module.with_suffix('.py').exists(), arguments
    elif command == 'python':
        assert (ROOT / arguments[0]).exists(), f'there is no {arguments[0]}'


def _check_pytest(arguments: list[str]) -> None:
    known = pytest_help()
    for argument in arguments:
        if argument.startswith('-'):
            assert re.search(rf'(?<![\w-]){re.escape(argument)}\b', known), argument
        elif '://' not in argument:
            path = ROOT.joinpath(*argument.split('.'))
            assert path.exists() or path.with_suffix('.py').exists(), argument


@cache
def pytest_help() -> str:
    return run_command('python -m pytest --noconftest --help')


def _check_celery(arguments: list[str]) -> None:
    known = celery_help()
    for argument in arguments:
        if argument.startswith('-'):
            option = argument.split('=')[0]
            assert re.search(rf'(?<![\w-]){re.escape(option)}\b', known), option


@cache
def celery_help() -> str:
    commands = ('--help', 'worker --help', '-A examples.hello triggers schema --help')
    return ''.join(run_command(f'celery {command}') for command in commands)


EVALUATORS = {
    'python': run_python,
    'pycon': run_pycon,
    'text': compare_text,
    'json': parse_json,
    'toml': parse_toml,
    'ini': parse_ini,
    'console': run_console,
    'bash': check_bash,
}


def imports_of(source: str) -> set[str]:
    """Return the modules that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


if __name__ == '__main__':
    # A page alone in its process: <page> <url> <prefix>.
    run_page(Path(sys.argv[1]), *sys.argv[2:])
