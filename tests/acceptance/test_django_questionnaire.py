"""The Django project: started as its README says, its pages in a real browser, real workers."""

from __future__ import annotations

import http.cookiejar
import os
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

import pytest
import redis

from tests.acceptance.test_approval import browser  # noqa: F401  (a fixture)
from tests.parts.servers import ACCEPTANCE_DB, redis_url
from tests.parts.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]

SURVEY: list[dict[str, Any]] = [
    {'age': 36, 'educ': 3, 'popul': 190}, {'tv_news': 3}, {'place': 4, 'party': 3, 'vote': 0},
]
REGISTRATION: list[dict[str, Any]] = [
    {'name': 'Ada', 'email': 'ada@example.org'}, {'minutes': 20, 'by': 'car'},
    {'speaks': ['english', 'asl'], 'interpreter': 'no'}, {'before': 'no', 'times': ''},
    {'topics': ['news', 'parks']}, {'day': 'sunday', 'agrees': 'on'},
]


# -------------------------------------------------------------------------- the site


class Site:
    """The project, run by its one command."""

    def __init__(self, folder: Path, workers: int, environ: dict[str, str]):
        self.folder = folder
        self.log = folder.with_suffix('.log')
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith('CELERY_')
        }
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, '-m', 'examples.django_questionnaire', '--port', '0',
                    '--folder', str(folder), '--workers', str(workers),
                ],
                cwd=ROOT, env={**inherited, **environ, 'C_FORCE_ROOT': '1'},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                # A shell that runs the tests in the background has them ignore SIGINT.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @cached_property
    def told(self) -> str:
        """What it says when it is ready."""
        assert self.process.stdout is not None
        lines = self.process.stdout.readline() + self.process.stdout.readline()
        assert 'password' in lines, lines + self.log.read_text()
        return lines

    @property
    def url(self) -> str:
        return re.findall(r'http://\S+/', self.told)[0]

    @property
    def password(self) -> str:
        """Of the user admin."""
        return self.told.split()[-1]

    def workers(self) -> list[int]:
        """Return the ids of the worker processes."""
        # Twice w, or else ps cuts its lines to the COLUMNS of the environment.
        listed = subprocess.run(
            ['ps', '-ww', '-A', '-o', 'pid=,ppid=,command='],
            capture_output=True, text=True, check=True,
        ).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()]
        return [
            int(pid) for pid, parent, command in rows
            if int(parent) == self.process.pid and 'celery' in command
        ]

    def rows(self, query: str, *values: object) -> list[Any]:
        """Ask the database of the project."""
        with closing(sqlite3.connect(self.folder / 'questionnaires.db')) as connection:
            return connection.execute(query, values).fetchall()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Wait until it has ended, with its workers, and look at what it logged."""
        workers = self.workers()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            for pid in [*workers, self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        logs = '\n'.join(log.read_text() for log in [self.log, *self.folder.glob('worker*.log')])
        assert code == 0, logs
        assert not any(Path(f'/proc/{pid}').exists() for pid in workers)
        assert 'Traceback' not in logs


@contextmanager
def ended(sites: dict[str, Site]) -> Iterator[None]:
    """End these processes however the block is left."""
    try:
        yield
    finally:
        for site in sites.values():
            site.interrupt()
        for site in sites.values():
            site.wait()


@pytest.fixture(scope='module')
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    """The project as it comes, and with other settings, by the key of its storage."""
    folder, prefix = tmp_path_factory.mktemp('django'), f'questionnaires-{uuid.uuid4().hex[:10]}'
    url = redis_url(ACCEPTANCE_DB)
    chosen = {
        'django': {},
        'sql': {'CELERY_TRIGGERS_MANAGER': 'default',
                'CELERY_TRIGGERS_STORAGE': f'sqlite:///{folder}/sessions.db'},
        'redis': {'CELERY_TRIGGERS_MANAGER': 'finalizing', 'CELERY_TRIGGERS_STORAGE': url,
                  'CELERY_TRIGGERS_KEY_PREFIX': prefix},
    }
    with ExitStack() as stack:
        stack.callback(forget, url, prefix)
        started: dict[str, Site] = {}
        stack.enter_context(ended(started))
        for storage, settings in chosen.items():
            workers = 2 if storage == 'django' else 1
            started[storage] = Site(folder / storage, workers, settings)
        yield started


def forget(url: str, prefix: str) -> None:
    """Remove what a site has left in Redis."""
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(f'*{prefix}*', count=1000):
            client.unlink(key)


@pytest.fixture
def site(sites: dict[str, Site]) -> Site:
    return sites['django']


# ----------------------------------------------------------------------- in a browser


class Person:
    """Somebody in a browser of their own, without JavaScript."""

    def __init__(self, chromium: Any, site: Site, home: str | None):
        self.context = chromium.new_context(java_script_enabled=False)
        self.requests: list[str] = []
        self.context.on('request', lambda request: self.requests.append(request.url))
        self.page = self.tab()
        if home is None:
            self.page.goto(site.url)
            self.click('Begin')
        self.home = home or str(self.page.url)
        self.id = self.home.rstrip('/').rpartition('/')[2]

    def tab(self) -> Any:
        page = self.context.new_page()
        page.set_default_timeout(15_000)
        return page

    def click(self, name: str) -> None:
        self.page.get_by_role('button', name=name).click()

    def follow(self, name: str) -> None:
        self.page.get_by_role('link', name=name).click()

    def answer(self, answers: dict[str, Any]) -> None:
        """Fill a page in by its labels, and save it."""
        for label, value in answers.items():
            field = self.page.get_by_label(label, exact=True)
            if value is True:
                field.check()
            else:
                field.fill(str(value))
        self.click('Save and go on')

    def sees(self, text: str) -> None:
        """Wait for a text: the page refreshes itself."""
        self.page.get_by_text(text).first.wait_for()

    @property
    def heading(self) -> str:
        return str(self.page.get_by_role('heading', level=1).inner_text())


SURVEY_IN_WORDS: list[dict[str, Any]] = [
    {'How old are you?': 36, 'High school diploma': True,
     'How many people live in your town?': 190},
    {'On how many days of a week do you watch the news on TV?': 3},
    {'Moderate': True, 'Independent': True, 'Clinton': True},
]
REGISTRATION_IN_WORDS: list[dict[str, Any]] = [
    {'Your name': 'Ada', 'Your email address': 'ada@example.org'},
    {'How long does it take you to come?': 20, 'By car': True},
    {'English': True, 'No': True},
    {'No': True},
    {'Housing': True, 'Parks': True},
    {'Sunday afternoon': True,
     'I let others speak, and what is said in the panel stays there': True},
]


@pytest.fixture
def new_person(browser: Any, site: Site) -> Iterator[Any]:  # noqa: F811
    people: list[Person] = []

    def arrive(home: str | None = None) -> Person:
        people.append(Person(browser, site, home))
        return people[-1]

    yield arrive
    for person in people:
        person.context.close()
        # Nothing comes from elsewhere.
        assert all(url.startswith(site.url) for url in person.requests)


def test_two_people_at_once_in_either_order_get_a_seat(site: Site, new_person: Any) -> None:
    ada, bo = new_person(), new_person()
    ada.click('Start the survey')
    bo.click('Start the registration')
    # Ada forgets something, and Bo writes what cannot be.
    ada.answer({'How old are you?': 7})
    bo.answer({'Your name': 'Bo', 'Your email address': 'bo@'})
    for person, told in (
        (ada, ['greater than or equal to 16', 'This field is required.']),
        (bo, ['Enter a valid email address.']),
    ):
        assert person.page.title().startswith('Error: ')
        assert all(text in person.page.get_by_role('alert').inner_text() for text in told)
    age = ada.page.get_by_label('How old are you?')
    assert age.get_attribute('aria-invalid') == 'true'
    assert not site.rows('SELECT * FROM questionnaires_page')

    for number in range(6):
        bo.answer(REGISTRATION_IN_WORDS[number])
        if number < 3:
            ada.answer(SURVEY_IN_WORDS[number])
    assert (ada.heading, bo.heading) == ('Check your answers', 'Check your answers')
    ada.click('Send')
    ada.sees('Done.')
    ada.sees('Of all 944, number 63 answered most like you: 30 years old')
    ada.sees('81 of 100 lived in smaller places.')
    ada.page.goto(ada.home)
    ada.sees('We look for a seat when we have')

    # The other way round.
    ada.click('Start the registration')
    bo.page.goto(bo.home)
    bo.sees('We look for a seat when we have')
    bo.click('Start the survey')
    for number in range(6):
        ada.answer(REGISTRATION_IN_WORDS[number])
        if number < 3:
            bo.answer(SURVEY_IN_WORDS[number])
    for person in (ada, bo):
        person.page.goto(person.home)
        person.sees('You sit at table')
        person.sees('Sunday afternoon')
    # They think alike, so they do not sit together.
    tables = site.rows(
        'SELECT "table" FROM questionnaires_seat WHERE applicant_id IN (?, ?)',
        uuid.UUID(ada.id).hex, uuid.UUID(bo.id).hex,
    )
    assert len({table for table, in tables}) == 2
    # The first message came once the first page was there, and each came once.
    messages = site.rows(
        'SELECT text FROM questionnaires_message WHERE applicant_id = ? ORDER BY id',
        uuid.UUID(ada.id).hex,
    )
    assert [text.split('!')[0].split(':')[0] for text, in messages] == [
        'Welcome, Ada', 'You have a seat',
    ]


def test_a_page_is_corrected_before_and_after_it_is_sent(site: Site, new_person: Any) -> None:
    visitor = Visitor(site.url)
    visitor.fill_in('survey', SURVEY)
    person = new_person(visitor.home)
    person.page.goto(visitor.url)
    person.follow('Change “The news”')
    days = 'On how many days of a week do you watch the news on TV?'
    assert person.page.get_by_label(days).input_value() == '3'
    person.answer({days: 7})
    person.click('Send')
    person.sees('Done.')
    person.sees('Corrected')
    person.sees('69 of 100 watched the news less often than you.')
    before = person.page.locator('[role=status]').inner_text()

    person.follow('Change “About you”')
    person.answer({'How old are you?': 91})
    assert person.page.get_by_role('button', name='Send again').is_visible()
    person.page.goto(person.home)
    person.follow('Look at the survey')
    person.sees('Of what you sent before your last changes.')
    person.follow('Check and send')
    person.click('Send again')
    person.sees('Done.')
    assert person.page.locator('[role=status]').inner_text() != before
    # Every correction was compared, each sending summarized, each once.
    person.page.get_by_text('Behind the scenes').click()
    told = person.page.locator('details').inner_text()
    assert set(re.findall(r'^(t_\w+#\d) is finished$', told, re.MULTILINE)) == {
        't_compare_about_you#0', 't_compare_about_you#1', 't_compare_news#0', 't_compare_news#1',
        't_compare_politics#0', 't_summarize#0', 't_summarize#1', 't_tell_applicant#0',
    }


def test_a_second_click_and_a_second_tab(site: Site, new_person: Any) -> None:
    person = new_person()
    person.click('Start the survey')
    run = uuid.UUID(person.page.url.split('/questionnaires/')[1].split('/')[0])
    other = person.tab()
    other.goto(person.page.url)
    for label, value in SURVEY_IN_WORDS[0].items():
        field = person.page.get_by_label(label, exact=True)
        field.check() if value is True else field.fill(str(value))
    person.page.get_by_role('button', name='Save and go on').dblclick()
    person.sees('page 2 of 3')

    # The other tab shows an empty page still, and is filled in otherwise.
    first, person.page = person.page, other
    person.answer({**SURVEY_IN_WORDS[0], 'How old are you?': 40})
    alert = person.page.get_by_role('alert').inner_text()
    assert 'saved with other answers since you opened it' in alert
    assert '36' in alert
    assert person.page.get_by_label('How old are you?').input_value() == '40'
    pages = 'SELECT revision, answers FROM questionnaires_page WHERE run_id = ?'
    (revision, answers), = site.rows(pages, run.hex)
    assert revision == 1
    assert '"age": 36' in answers
    # Now they have seen it, and mean it.
    person.click('Save and go on')
    person.sees('page 2 of 3')

    # The first tab goes back: it shows what the other one saved, and saves that.
    first.go_back()
    assert first.get_by_label('How old are you?').input_value() == '40'
    first.get_by_role('button', name='Save and go on').click()
    first.get_by_text('page 2 of 3').wait_for()
    (revision, answers), = site.rows(pages, run.hex)
    assert revision == 2
    assert '"age": 40' in answers
    fired = site.rows(
        'SELECT uid FROM questionnaires_timelineentry WHERE "trigger" = ? AND uid LIKE ?',
        'page1', f'%{run}',
    )
    assert len(fired) == 2


# --------------------------------------------------------------------- without a browser


class Visitor:
    """Somebody who asks by HTTP: gets pages, and sends the forms on them."""

    def __init__(self, url: str):
        self.opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        )
        self.url, self.text = url, ''
        self.get(url)
        self.post({})
        self.home = self.url

    def get(self, path: str) -> str:
        self._read(self.opener.open(urljoin(self.url, path), timeout=30))
        return self.text

    def post(self, answers: dict[str, Any], path: str = '') -> None:
        """Send answers with what is hidden in the form of the page."""
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', self.text))
        body = urlencode({**hidden, **answers}, doseq=True).encode()
        self._read(self.opener.open(urljoin(self.url, path), body, timeout=30))

    def _read(self, answer: Any) -> None:
        with answer:
            self.url, self.text = answer.url, unescape(answer.read().decode())

    def fill_in(self, questionnaire: str, answers: list[dict[str, Any]]) -> None:
        self.get(self.home)
        self.post({}, f'{self.home}{questionnaire}/')
        for page in answers:
            self.post(page)

    def sees(self, *texts: str) -> None:
        def seen() -> bool:
            return all(text in self.get(self.url) for text in texts)

        eventually(seen, f'{texts} on {self.url}')


def test_a_withdrawal_takes_the_seat_back(site: Site) -> None:
    visitor = Visitor(site.url)
    visitor.fill_in('survey', SURVEY)
    visitor.fill_in('registration', REGISTRATION)
    registration = visitor.url.replace('/check/', '/')
    visitor.get(visitor.home)
    visitor.sees('You sit at')
    visitor.get(f'{registration}withdraw/')
    visitor.post({})
    assert 'You have withdrawn this.' in visitor.text
    visitor.get(visitor.home)
    visitor.sees('there is no seat for you', 'others may have your seat',
                 't_take_seat_back#0 is finished')
    # Nothing can be changed any more.
    visitor.get(f'{registration}pages/1/')
    assert visitor.url == registration


def test_after_a_withdrawal_nobody_looks_for_a_seat(site: Site) -> None:
    visitor = Visitor(site.url)
    visitor.fill_in('survey', SURVEY)
    visitor.get(visitor.url.replace('/check/', '/withdraw/'))
    visitor.post({})
    visitor.sees('t_summarize#0 is abandoned', 't_tell_of_withdrawal#0 is finished')
    visitor.fill_in('registration', REGISTRATION)
    visitor.get(visitor.home)
    visitor.sees('t_give_seat#0 is abandoned', 'there is no seat for you')
    assert 'You sit at' not in visitor.text


def test_a_page_that_is_not_reached_yet_and_one_that_is_not_there(site: Site) -> None:
    visitor = Visitor(site.url)
    visitor.post({}, f'{visitor.home}registration/')
    start = visitor.url
    assert start.endswith('/pages/1/')
    for early in ('/pages/5/', '/check/'):
        visitor.get(start.replace('/pages/1/', early))
        assert visitor.url == start
    visitor.post(REGISTRATION[0])
    assert visitor.url.endswith('/pages/2/')
    assert 'Back to page 1' in visitor.text
    visitor.get(start)
    assert 'value="Ada"' in visitor.text
    with pytest.raises(urllib.error.HTTPError, match='404'):
        visitor.get(f'/applicants/{uuid.uuid4()}/')


def test_the_admin_shows_the_sessions(site: Site) -> None:
    visitor = Visitor(site.url)
    visitor.fill_in('survey', SURVEY[:1])
    applicant = visitor.home.rstrip('/').rpartition('/')[2]
    run, = site.rows(
        'SELECT id FROM questionnaires_run WHERE applicant_id = ?', uuid.UUID(applicant).hex
    )
    visitor.get('/admin/celery_triggers/session/')
    visitor.post({'username': 'admin', 'password': site.password})
    assert f'questionnaire:survey:{uuid.UUID(run[0])}' in visitor.text


def test_a_form_of_elsewhere_is_refused(site: Site) -> None:
    with pytest.raises(urllib.error.HTTPError, match='403'):
        urllib.request.urlopen(site.url, urlencode({'id': uuid.uuid4()}).encode(), timeout=30)


@pytest.mark.parametrize(('manager', 'storage'), [('default', 'sql'), ('finalizing', 'redis')])
def test_with_another_manager_and_storage(
    sites: dict[str, Site], manager: str, storage: str
) -> None:
    site = sites[storage]
    visitor = Visitor(site.url)
    visitor.fill_in('registration', REGISTRATION)
    visitor.fill_in('survey', SURVEY)
    visitor.post({})
    visitor.sees('Done.', 'number 63 answered most like you')
    assert f'storage <code>{storage}</code>, manager <code>{manager}</code>' in visitor.text
    visitor.get(visitor.home)
    visitor.sees('You sit at', 'Sunday afternoon')
    assert not site.rows('SELECT * FROM questionnaires_timelineentry')


def test_the_migrations_are_those_of_the_models(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'examples.django_questionnaire.manage', 'makemigrations',
         '--check', '--dry-run'],
        cwd=ROOT, env={**os.environ, 'QUESTIONNAIRES_FOLDER': str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
