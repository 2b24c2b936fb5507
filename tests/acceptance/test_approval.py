"""The example with a human in it: its page, in a real browser without JavaScript."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from celery_triggers.exceptions import GateAbandoned, GateExpired
from tests.acceptance.example_worker import ROOT, Example, running
from tests.parts.servers import nothing_may_be_missing

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


def missing(what: str) -> None:
    """Skip by name, or fail where nothing may be missing."""
    if nothing_may_be_missing():
        pytest.fail(f'CI=true, and there is no {what}')
    pytest.skip(f'there is no {what}')


@pytest.fixture(scope='module')
def approval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with running('examples.approval.app', tmp_path_factory.mktemp('approval')) as started:
        yield started


@pytest.fixture(scope='module')
def url(approval: Example, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is, served as the README says."""
    log = tmp_path_factory.mktemp('page') / 'page.log'
    with log.open('wb') as stream:
        process = subprocess.Popen(
            [sys.executable, '-m', 'examples.approval', '--port', '0'], cwd=ROOT,
            env=approval.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream,
            text=True, start_new_session=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r'http://\S+', line)
        assert found, line + log.read_text()
        yield found[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing(f'browser: {", ".join(BROWSERS)}')
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing('playwright')
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Open the page as somebody who has just come, any number of times."""
    contexts = []

    def new_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**{'java_script_enabled': False, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.goto(url)
        return page

    yield new_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Any) -> Any:
    return open_page()


def submit(approval: Example, title: str, **options: Any) -> tuple[str, Any]:
    """Submit an article, and wait until an editor can see it."""
    uid, result = approval.module.submit('Ada', title, 'Some text.', **options)
    approval.wait_for(lambda: 't_publish#0' in approval.storage(uid), f'{title} waits at the gate')
    return uid, result


def reload_until(approval: Example, page: Any, locator: Any) -> None:
    """Ask for the page again, as somebody without JavaScript does, until this is on it."""

    def seen() -> bool:
        page.goto(page.url.split('?')[0])
        return locator.count() == 1

    approval.wait_for(seen, str(locator))


def card(page: Any, title: str) -> Any:
    return page.get_by_role('article').filter(
        has=page.get_by_role('heading', name=title, exact=True)
    )


def row(page: Any, title: str) -> Any:
    return page.get_by_role('listitem').filter(has=page.get_by_text(title, exact=True))


def message(page: Any) -> str:
    return str(page.get_by_role('status').inner_text())


# ------------------------------------------------------------------- decisions


def test_an_article_is_submitted_approved_and_published(approval: Example, page: Any) -> None:
    page.get_by_label('Author').fill('Grace')
    page.get_by_label('Title').fill('Compilers')
    page.get_by_label('Text').fill('They translate.')
    page.get_by_role('button', name='Submit').click()
    assert 'Submitted' in message(page) or 'waits for a decision' in message(page)
    reload_until(approval, page, card(page, 'Compilers'))
    assert 'By Grace, 2 words.' in card(page, 'Compilers').inner_text()
    page.get_by_role('button', name='Approve “Compilers”').click()
    assert re.fullmatch('“Compilers” is (approved|published).', message(page))
    assert card(page, 'Compilers').count() == 0
    reload_until(approval, page, row(page, 'Compilers').filter(has_text='Published: /articles/'))
    approval.wait_for(
        lambda: 'To Grace: "Compilers" is at /articles/' in approval.log, 'Grace knows'
    )


def test_a_rejected_article_goes_back_with_the_reason(approval: Example, open_page: Any) -> None:
    uid, result = submit(approval, 'Poetry')
    page = open_page()
    card(page, 'Poetry').get_by_label('Reason').fill('We print no poetry')
    page.get_by_role('button', name='Reject “Poetry”').click()
    assert message(page) == '“Poetry” is rejected.'
    assert 'Rejected: We print no poetry' in row(page, 'Poetry').inner_text()
    with pytest.raises(GateAbandoned) as raised:
        result.get(timeout=30)
    assert (raised.value.uid, raised.value.reason) == (uid, 'unless: rejected')
    told = 'To Ada: "Poetry" is not published: We print no poetry'
    approval.wait_for(lambda: told in approval.log, 'Ada knows')
    assert approval.log.count('"Poetry" is') == 1
    assert approval.settled(uid) == {'t_publish#0': 'abandoned'}


def test_a_rejection_needs_no_reason(approval: Example, open_page: Any) -> None:
    submit(approval, 'Prose')
    page = open_page()
    page.get_by_role('button', name='Reject “Prose”').click()
    assert 'Rejected: no reason was given' in row(page, 'Prose').inner_text()


def test_an_article_on_which_nobody_decides_expires(approval: Example, open_page: Any) -> None:
    uid, result = submit(approval, 'Old news', within=2)
    page = open_page()
    assert card(page, 'Old news').count() == 1
    with pytest.raises(GateExpired):
        result.get(timeout=30)
    # The editor still has the page of before in front of them.
    page.get_by_role('button', name='Approve “Old news”').click()
    assert message(page) == '“Old news” was already expired.'
    assert 'Expired: nobody decided in time' in row(page, 'Old news').inner_text()
    told = 'To Ada: "Old news" is not published: nobody decided in time'
    approval.wait_for(lambda: told in approval.log, 'Ada knows')
    assert approval.log.count('"Old news" is') == 1
    assert approval.settled(uid) == {'t_publish#0': 'abandoned'}


def test_of_two_decisions_the_first_counts(approval: Example, open_page: Any) -> None:
    uid, _ = submit(approval, 'Dispute')
    one, other = open_page(), open_page()
    one.get_by_role('button', name='Reject “Dispute”').click()
    other.get_by_role('button', name='Approve “Dispute”').click()
    assert message(one) == '“Dispute” is rejected.'
    assert message(other) == '“Dispute” was already rejected.'
    assert approval.settled(uid) == {'t_publish#0': 'abandoned'}
    assert approval.storage(uid).latest_kwargs.keys().isdisjoint({'approved', 't_publish'})


# -------------------------------------------------------------------- the page


def test_nothing_waits(approval: Example, open_page: Any) -> None:
    for uid in list(approval.app.triggers.sessions('article:')):
        approval.app.triggers.delete(uid)
    page = open_page()
    assert page.get_by_text('Nothing waits for a decision.').is_visible()
    assert page.get_by_text('Nothing yet.').is_visible()
    assert page.title() == '0 to approve · Articles'


def test_what_somebody_wrote_is_text_and_never_code(approval: Example, open_page: Any) -> None:
    nasty = '<script>document.title = "taken"</script><b>"Bold" & \'brave\'</b>'
    approval.module.submit(nasty, nasty, nasty + 'x' * 300)
    page = open_page(java_script_enabled=True, viewport={'width': 375, 'height': 700})
    reload_until(approval, page, card(page, nasty))
    page.get_by_label(f'Reason to reject “{nasty}”').fill(nasty)
    page.get_by_role('button', name=f'Reject “{nasty}”').click()
    assert nasty in row(page, nasty).inner_text()
    assert message(page) == f'“{nasty}” is rejected.'
    assert page.title() != 'taken'
    assert page.locator('script, main b').count() == 0
    # Nor does it make a phone scroll sideways.
    assert page.evaluate('document.documentElement.scrollWidth') == 375


def test_it_can_be_used_with_a_keyboard_and_read_aloud(approval: Example, open_page: Any) -> None:
    uid, _ = submit(approval, 'Braille')
    page = open_page(java_script_enabled=True)
    assert page.locator('html').get_attribute('lang') == 'en'
    assert re.fullmatch(r'\d+ to approve · Articles', page.title())
    fields = page.locator('input:not([type=hidden]), textarea')
    assert fields.count() > 3
    for label in fields.evaluate_all('all => all.map(one => one.labels[0]?.innerText)'):
        assert label
    approve = page.get_by_role('button', name='Approve “Braille”')
    for _ in range(50):
        page.keyboard.press('Tab')
        if approve.evaluate('one => one === document.activeElement'):
            break
    assert approve.evaluate('one => getComputedStyle(one).outlineStyle') == 'solid'
    page.keyboard.press('Enter')
    page.wait_for_url('**wanted=approved')
    assert page.evaluate('document.activeElement.innerText').startswith('“Braille” is ')
    assert approval.result(uid, 't_publish#0')['title'] == 'Braille'


# ------------------------------------------------------------------- strangers


def post(url: str, path: str, form: dict[str, str], **headers: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request('POST', path, urlencode(form), {
            'Content-Type': 'application/x-www-form-urlencoded', **headers,
        })
        return connection.getresponse().status
    finally:
        connection.close()


def get(url: str, path: str = '/', **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request('GET', path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_only_a_form_of_the_page_can_decide(approval: Example, url: str) -> None:
    uid, _ = submit(approval, 'Secrets')
    status, text = get(url)
    found = re.search(r'name="token" value="([\w-]+)"', text)
    assert status == 200
    assert found
    form = {'uid': uid, 'token': found[1]}
    assert post(url, '/approve', {'uid': uid}) == 403
    assert post(url, '/approve', {'uid': uid, 'token': 'guéssed'}) == 403
    # A name that somebody else lets lead to this machine.
    assert post(url, '/approve', form, Host='elsewhere.example') == 403
    assert get(url, Host='elsewhere.example')[0] == 403
    assert get(url, f'/approve?{urlencode(form)}')[0] == 404
    assert post(url, '/approve', {}, **{'Content-Length': '100001'}) == 413
    assert post(url, '/submit', form) == 400
    assert post(url, '/elsewhere', form) == 400
    assert approval.settled(uid) == {'t_publish#0': 'unstarted'}
    # Sessions that are no articles stay what they are.
    assert post(url, '/approve', {**form, 'uid': 'article:unheard-of'}) == 303
    assert not approval.storage('article:unheard-of').exists
    assert post(url, '/approve', form) == 303
    assert approval.result(uid, 't_publish#0')['title'] == 'Secrets'
