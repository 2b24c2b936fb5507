"""The main example, run as a person runs it, with fewer respondents."""

from __future__ import annotations

import csv
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.parts.servers import ACCEPTANCE_DB, redis_url

ROOT = Path(__file__).resolve().parents[2]
REDIS_URL = redis_url(ACCEPTANCE_DB)
RESPONDENTS = 60
SEED = 7

ANSWERS = (
    'popul', 'TVnews', 'selfLR', 'ClinLR', 'DoleLR', 'PID', 'age', 'educ', 'income', 'vote',
)


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, '-m', module, *map(str, arguments)]


def run(
    module: str, *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *arguments), cwd=folder, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=100,
    )


@dataclass
class Expected:
    """What must come of the events, told from nothing but the events and the rules."""

    numbers: dict[str, int]
    instances: dict[str, dict[str, int]]
    finished: set[str] = field(default_factory=set)
    embedded: set[str] = field(default_factory=set)


@pytest.fixture(scope='module')
def expected() -> Expected:
    sys.path.insert(0, str(ROOT))
    try:
        from examples.questionnaire.respondents import arrivals, read_respondents
    finally:
        sys.path.remove(str(ROOT))
    events = arrivals(read_respondents(RESPONDENTS, SEED))
    triggers: dict[str, set[str]] = defaultdict(set)
    pages: list[tuple[str, str]] = []
    for event in events:
        triggers[event.uid].add(event.trigger)
        if event.trigger == 'pageReceived':
            pages.append((event.uid, event.event_id))
    complete = {uid for uid, seen in triggers.items() if 'questionnaireComplete' in seen}
    embedded = {uid for uid, seen in triggers.items() if 'isEmbeddedApplication' in seen}
    everybody = set(triggers)
    applied = Counter(uid in complete for uid, _ in set(pages))
    instances = {
        't_importSubject': {
            'finished': len(complete), 'unstarted': len(everybody - complete),
            'rows': len(complete),
        },
        't_importResponses': {
            'finished': applied[True], 'unstarted': applied[False], 'rows': applied[True],
        },
        't_importBrowserMetadata': {
            'finished': len(complete - embedded),
            'unstarted': len(everybody - complete - embedded),
            'abandoned': len(embedded),
            'rows': len(complete - embedded),
        },
        't_markComplete': {'finished': len(complete), 'rows': len(complete)},
    }
    numbers = {
        'respondents': RESPONDENTS,
        'who finish': len(complete),
        'who do not': RESPONDENTS - len(complete),
        'with an embedded application': len(embedded),
        'events fired': len(events),
        'pages received': len(pages),
        'repeated, counted once': len(pages) - len(set(pages)),
        'rows written': sum(task['rows'] for task in instances.values()),
    }
    return Expected(numbers, instances, complete, embedded)


def test_the_made_up_part_has_everything_in_it(expected: Expected) -> None:
    assert len(expected.instances) == 4
    assert all(expected.numbers.values()), 'this seed leaves something out'
    assert expected.embedded & expected.finished
    assert expected.embedded - expected.finished


def instances_in(output: str) -> dict[str, dict[str, int]]:
    """Read the table of instances; what is zero is left out."""
    lines = [line.split() for line in output.splitlines()]
    header = next(line for line in lines if line[:2] == ['trigger', 'task'])[2:]
    return {
        line[0]: {
            name: int(number)
            for name, number in zip(header, line[1:], strict=True)
            if number != '0'
        }
        for line in lines
        if line and line[0].startswith('t_') and len(line) == len(header) + 1
    }


def check_output(output: str, expected: Expected) -> None:
    for name, number in expected.numbers.items():
        assert re.search(rf'^\s*{name}\s+{number}\s*$', output, re.MULTILINE), (name, output)
    wanted = {
        task: {name: number for name, number in counts.items() if number}
        for task, counts in expected.instances.items()
    }
    assert instances_in(output) == wanted
    assert 'check: every row is as the file and the rules say' in output
    assert 'Made up, from the seed 7' in ' '.join(output.split())


def check_database(path: Path, expected: Expected) -> None:
    """Compare the final answers with the file, by other means than the example's."""
    with (ROOT / 'examples/questionnaire/data/anes96.csv').open(newline='') as file:
        truth = {f'respondent:{row["respondent"]}': row for row in csv.DictReader(file)}
    connection = sqlite3.connect(path)
    try:
        for answer in ANSWERS:
            found = dict(
                connection.execute(
                    f'SELECT uid, {answer} FROM questionnaire_responses '
                    f'WHERE {answer} IS NOT NULL ORDER BY revision'
                ).fetchall()
            )
            assert found == {uid: int(truth[uid][answer]) for uid in expected.finished}
        browsers = {uid for uid, in connection.execute('SELECT uid FROM questionnaire_browsers')}
        assert browsers == expected.finished - expected.embedded
    finally:
        connection.close()


@pytest.fixture(scope='module')
def database(tmp_path_factory: pytest.TempPathFactory, expected: Expected) -> Path:
    """The rows of a run on the embedded parts, whose output is looked at here."""
    path = tmp_path_factory.mktemp('questionnaire') / 'answers.db'
    before = worker_processes()
    done = run(
        'examples.questionnaire', '--respondents', RESPONDENTS, '--seed', SEED,
        # Relative, as a person writes it: the workers have to mean the same file.
        '--database', f'sqlite:///{path.name}', folder=path.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_output(done.stdout, expected)
    assert worker_processes() <= before
    return path


def worker_processes() -> set[int]:
    """Return the ids of the running workers of the example."""
    # Twice w, or else ps cuts its lines to the COLUMNS of the environment.
    listed = subprocess.run(
        ['ps', '-ww', '-A', '-o', 'pid=,command='], capture_output=True, text=True, check=True
    ).stdout
    return {
        int(line.split(None, 1)[0])
        for line in listed.splitlines()
        if 'celery -A examples.questionnaire.app worker' in line
    }


def check_again(database: Path) -> subprocess.CompletedProcess[str]:
    return run(
        'examples.questionnaire.check', '--respondents', RESPONDENTS, '--seed', SEED,
        '--database', f'sqlite:///{database}',
    )


def test_on_the_embedded_parts(database: Path, expected: Expected) -> None:
    check_database(database, expected)
    again = check_again(database)
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize(
    ('damage', 'told'),
    [
        ('UPDATE {responses} SET age = age + 1 WHERE id = (SELECT max(id) FROM {responses} '
         'WHERE age IS NOT NULL)', r'respondent:\d+: age is \d+, and should be \d+'),
        ('DELETE FROM {subjects} WHERE id = 1',
         r'respondent:\d+: t_importSubject wrote 0 rows, not 1'),
        ('INSERT INTO {completions} (uid, instance) '
         'SELECT uid, instance FROM {completions} WHERE id = 1',
         r'respondent:\d+: t_markComplete wrote 2 rows, not 1'),
        ("UPDATE {browsers} SET browser = 'Lynx' WHERE id = 1",
         r'respondent:\d+: browser is Lynx, and should be \w+'),
        ("UPDATE {responses} SET uid = 'respondent:9999' WHERE id = 1",
         'respondent:9999: nobody answered under this name'),
    ],
    ids=['answer', 'missing', 'doubled', 'browser', 'stranger'],
)
def test_the_check_sees_a_corrupted_row(
    database: Path, tmp_path: Path, damage: str, told: str
) -> None:
    copy = tmp_path / 'answers.db'
    names = ('subjects', 'responses', 'browsers', 'completions')
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target.execute(damage.format(**{name: f'questionnaire_{name}' for name in names}))
    target.commit()
    target.close()
    source.close()
    done = check_again(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(told, done.stdout), done.stdout


def test_an_instance_that_wrote_twice_or_never_is_told(expected: Expected) -> None:
    from examples.questionnaire.check import check_instances

    rows = {'t_importSubject': [{'uid': 'respondent:1', 'instance': 't_importSubject#0'}] * 2}
    finished = {
        't_importSubject': [
            ('respondent:1', 't_importSubject#0'), ('respondent:2', 't_importSubject#0'),
        ]
    }
    assert check_instances(rows, finished) == [
        'respondent:1: t_importSubject#0 wrote 2 rows and finished 1 times',
        'respondent:2: t_importSubject#0 wrote 0 rows and finished 1 times',
    ]


def test_on_redis(tmp_path: Path, expected: Expected) -> None:
    import redis

    client = redis.Redis.from_url(REDIS_URL)
    path = tmp_path / 'answers.db'
    done = run(
        'examples.questionnaire', '--respondents', RESPONDENTS, '--seed', SEED,
        '--storage', REDIS_URL, '--broker', REDIS_URL, '--database', f'sqlite:///{path}',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_output(done.stdout, expected)
    check_database(path, expected)
    assert not list(client.scan_iter('*questionnaire-*', count=1000))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_early_it_ends_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    before = worker_processes()
    process = subprocess.Popen(
        command('examples.questionnaire'),
        cwd=ROOT, env={**os.environ, 'TMPDIR': str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell that runs the tests in the background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while len(worker_processes() - before) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, 'no two workers came'
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), output
    assert b'Traceback' not in output
    assert worker_processes() <= before
    assert not list(tmp_path.iterdir())
