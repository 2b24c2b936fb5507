"""The admin: what it shows, what its actions do, and what it lets nobody do."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.manager import TriggerManager
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.media import Medium
from tests.django import databases
from tests.django.conftest import ALIASES, prepared

SESSIONS = '/admin/celery_triggers/session/'
INSTANCES = '/admin/celery_triggers/instance/'


#: What is asked of a database in an unusual way.
on_every_database = pytest.mark.parametrize('alias', ALIASES, indirect=True)


@pytest.fixture(params=['postgresql'])
def alias(request: pytest.FixtureRequest) -> str:
    return prepared(request.param)


@pytest.fixture
def users(app: Celery) -> Iterator[Any]:
    from django.contrib.auth.models import User

    databases.prepare('default')
    yield User
    User.objects.all().delete()


@pytest.fixture
def client(users: Any) -> Any:
    """The browser of somebody who may do everything."""
    return logged_in(users.objects.create_superuser('ann'))


def logged_in(user: Any) -> Any:
    from django.test import Client

    client = Client()
    client.force_login(user)
    return client


def with_permissions(users: Any, *names: str) -> Any:
    from django.contrib.auth.models import Permission

    user = users.objects.create_user('bob', is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return logged_in(user)


def session(app: Celery, uid: str) -> TriggerManager:
    found: TriggerManager = app.triggers.session(uid)
    return found


def fail(manager: TriggerManager, name: str) -> None:
    run = delivery(manager, name)
    assert run.claim()
    facts = {'type': 'IOError', 'message': 'no <paper>', 'traceback': 'Traceback: ...'}
    assert run.fail('it raised', {**facts, 'context': {'printer': 7}})


@pytest.fixture
def failed(app: Celery) -> TriggerManager:
    """A session with an instance that failed, one that waits and one that is finished."""
    manager = session(app, 'order:1')
    manager.fire('item', {'n': '<b>'}, event_id='first')
    fail(manager, 't_each#0')
    manager.fire('item', {'n': 2})
    run = delivery(manager, 't_each#1')
    run.claim()
    run.finish({'parcel': 'P-2'})
    manager.fire('a')
    return manager


def ids(client: Any, url: str) -> list[str]:
    """Return the primary keys of the rows that a list shows."""
    found = client.get(url)
    assert found.status_code == 200
    return re.findall(r'name="_selected_action" value="([^"]*)"', found.content.decode())


def uids(client: Any, query: str = '') -> list[str]:
    found = client.get(f'{SESSIONS}{query}').content.decode()
    return re.findall(r'field-uid"><a[^>]*>([^<]*)</a>', found)


def text_of(answer: Any) -> str:
    assert answer.status_code == 200
    without_tags = re.sub(r'<[^>]*>', ' ', answer.content.decode())
    return ' '.join(without_tags.split())


def page_of(client: Any, uid: str) -> str:
    """Return the address of a session's page."""
    found = client.get(SESSIONS).content.decode()
    return re.findall(rf'href="({SESSIONS}[^"]*/change/)[^"]*">{uid}<', found)[0]


def act(client: Any, url: str, action: str, *chosen: str, **more: Any) -> list[tuple[str, str]]:
    """Do an action of a list; return the messages, each with its level."""
    answer = client.post(
        url, {'action': action, '_selected_action': chosen or ids(client, url), **more},
        follow=True,
    )
    return said(answer)


def said(answer: Any) -> list[tuple[str, str]]:
    assert answer.status_code == 200
    listed = r'<li class="(success|error)">(.*?)</li>'
    found = re.findall(listed, answer.content.decode(), re.DOTALL)
    return [(level, html.unescape(text)) for level, text in found]


# -------------------------------------------------------------------- what is shown


@on_every_database
def test_the_list_of_sessions(client: Any, failed: TriggerManager, app: Celery):
    session(app, 'order:2').fire('a')
    session(app, 'order:2').cancel()
    found = text_of(client.get(SESSIONS))
    assert re.search(r'order:1 failed 2 1 5 default 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d', found)
    assert 'order:2 cancelled 0 0 2 default' in found
    assert 'Add session' not in found


@on_every_database
@pytest.mark.parametrize(
    ('query', 'wanted'),
    [
        ('', ['order:1', 'order:2', 'order:3', 'other']),
        ('?q=order', ['order:1', 'order:2', 'order:3']),
        ('?q=order:2', ['order:2']),
        ('?q=rder', []),
        ('?state=unhappy', ['order:1']),
        ('?state=unresolved', ['order:1', 'order:3']),
        ('?state=resolved', ['order:2', 'other']),
        ('?state=pending', ['other']),
        ('?q=order&state=resolved', ['order:2']),
    ],
)
def test_sessions_are_searched_and_filtered(
    client: Any, failed: TriggerManager, app: Celery, alias: str, query: str, wanted: list[str]
):
    from django.db import connections, transaction

    session(app, 'order:2').fire('a')
    session(app, 'order:2').cancel()
    session(app, 'order:3').fire('a')
    session(app, 'other').start()
    with transaction.atomic(alias):
        session(app, 'other').fire('a')
        connections[alias].run_on_commit.clear()
    assert uids(client, query) == wanted


def test_the_page_of_a_session(client: Any, failed: TriggerManager):
    answer = client.get(page_of(client, 'order:1'))
    found = text_of(answer)
    assert 't_each#0 failed (it raised): IOError: no &lt;paper&gt;' in found
    assert '&quot;printer&quot;: 7' in found
    assert 'Traceback: ...' in found
    assert '&quot;n&quot;: &quot;&lt;b&gt;&quot;' in found
    assert 't_join#0 unstarted it has a and waits for b' in found
    assert '&quot;parcel&quot;: &quot;P-2&quot;' in found
    # The firings, the latest first.
    history = found[found.index('# Trigger'):]
    assert [history.index(name) for name in ('5 a', '4 t_each', '3 item', '2 t_each:failed')]
    places = [history.index(f' {n} {name}') for n, name in (
        (5, 'a'), (4, 't_each'), (3, 'item'), (2, 't_each:failed'), (1, 'item')
    )]
    assert places == sorted(places)
    # What has failed comes first, and is open.
    instances = r'<details class="triggers-instance" id="([^"]*)"( open)?'
    order = re.findall(instances, answer.content.decode())
    assert order == [('t_each#0', ' open'), ('t_join#0', ''), ('t_each#1', '')]


def test_what_is_still_to_be_applied_is_shown(client: Any, app: Celery, alias: str):
    from django.db import connections, transaction

    manager = session(app, 'order:1')
    manager.fire('a', countdown=3600, event_id='tomorrow')
    with transaction.atomic(alias):
        manager.fire('b')
        connections[alias].run_on_commit.clear()
    found = text_of(client.get(page_of(client, 'order:1')))
    assert 'A firing that was part of a transaction at once' in found
    assert 'a tomorrow 20' in found


def test_a_session_of_many_instances_shows_some(client: Any, app: Celery, monkeypatch: Any):
    from celery_triggers.contrib.django import showing

    monkeypatch.setattr(showing, 'MOST_INSTANCES', 3)
    monkeypatch.setattr(showing, 'MOST_FIRINGS', 2)
    monkeypatch.setattr(showing, 'MOST_CHARACTERS', 50)
    manager = session(app, 'order:1')
    for number in range(5):
        manager.fire('item', {'n': number, 'text': 'x' * 100})
    found = text_of(client.get(page_of(client, 'order:1')))
    assert 'And 2 more: all of them' in found
    assert '3 earlier firings are not shown' in found
    assert 'characters)' in found


@on_every_database
def test_the_list_of_instances(client: Any, failed: TriggerManager):
    found = text_of(client.get(INSTANCES))
    assert 't_each#0 order:1 failed (it raised): IOError: no &lt;paper&gt; 20' in found
    assert 't_join#0 order:1 unstarted it has a and waits for b 20' in found
    assert 't_each#1 order:1 finished - 20' in found


@on_every_database
@pytest.mark.parametrize(
    ('query', 'wanted'),
    [
        ('?status=unhappy', 1), ('?status=failed', 1), ('?status=unstarted', 1),
        ('?status=skipped', 0), ('?q=order', 3), ('?q=t_each', 2), ('?q=each', 0),
        ('?q=order:1&status=finished', 1),
    ],
)
def test_instances_are_searched_and_filtered(
    client: Any, failed: TriggerManager, query: str, wanted: int
):
    assert len(ids(client, f'{INSTANCES}{query}')) == wanted


def test_an_instance_leads_to_its_place_on_the_page(client: Any, failed: TriggerManager):
    number = ids(client, f'{INSTANCES}?status=failed')[0]
    answer = client.get(f'{INSTANCES}{number}/change/')
    assert answer.status_code == 302
    assert answer.url == f'{page_of(client, "order:1")}#t_each%230'


def test_sessions_of_another_prefix_are_not_shown(
    client: Any, failed: TriggerManager, medium: Medium
):
    other = medium.manager(uid='hidden', triggers_key_prefix='other')
    other.start()
    assert uids(client) == ['order:1']
    from celery_triggers.contrib.django.models import Session

    hidden = Session.objects.using(other.storage.alias).get(uid='hidden')
    assert client.get(f'{SESSIONS}{hidden.pk}/change/').status_code == 302
    assert len(ids(client, INSTANCES)) == 3


def test_a_list_costs_the_same_for_many_rows(
    client: Any, app: Celery, alias: str, failed: TriggerManager
):
    from django.db import connections
    from django.test.utils import CaptureQueriesContext

    counts = []
    for size in (1, 20):
        for number in range(size):
            session(app, f'x:{size}:{number}').fire('item')
        for url in (SESSIONS, INSTANCES):
            client.get(url)
            with CaptureQueriesContext(connections[alias]) as captured:
                client.get(url)
            counts.append(len(captured))
    assert counts[:2] == counts[2:]
    assert max(counts) <= 4


def test_a_session_of_a_newer_version_is_shown_as_far_as_can_be(
    client: Any, failed: TriggerManager, alias: str
):
    from celery_triggers.contrib.django.models import Session

    Session.objects.using(alias).update(head='{"format":99}')
    assert uids(client) == ['order:1']
    assert text_of(client.get(INSTANCES))
    answer = client.get(page_of(client, 'order:1'))
    assert 'newer version' in said(answer)[0][1]


# ------------------------------------------------------------------- what actions do


@on_every_database
def test_instances_are_replayed(
    client: Any, app: Celery, failed: TriggerManager, handed: list[str]
):
    handed.clear()
    other = session(app, 'order:2')
    other.fire('item')
    fail(other, 't_each#0')
    handed.clear()
    assert act(client, f'{INSTANCES}?status=failed', 'replay') == [
        ('success', 'Replayed 2 instances.')
    ]
    assert handed == ['t_each#2', 't_each#1']
    assert statuses(failed)['t_each#0'] == 'replayed'


def test_what_is_refused_is_a_message_and_others_go_on(
    client: Any, failed: TriggerManager, app: Celery
):
    other = session(app, 'order:2')
    other.fire('item')
    fail(other, 't_each#0')
    messages = act(client, INSTANCES, 'skip')
    assert [level for level, _ in messages] == ['error', 'error', 'success']
    assert messages[0][1].startswith('Not skipped: t_each#1 of order:1: t_each#1 of session')
    assert messages[1][1].startswith('Not skipped: t_join#0 of order:1: ')
    assert messages[2][1] == 'Skipped 2 instances.'
    assert statuses(failed)['t_each#0'] == statuses(other)['t_each#0'] == 'skipped'


def test_a_storage_that_is_away_is_a_message(
    client: Any, failed: TriggerManager, app: Celery, monkeypatch: pytest.MonkeyPatch
):
    other = session(app, 'order:2')
    other.fire('item')
    fail(other, 't_each#0')
    real = TriggerManager.replay_failed_instance

    def away(manager: TriggerManager, name: str) -> Any:
        if manager.uid == 'order:1':
            raise StorageUnavailable('it is away')
        return real(manager, name)

    monkeypatch.setattr(TriggerManager, 'replay_failed_instance', away)
    assert act(client, f'{INSTANCES}?status=failed', 'replay') == [
        ('error', 'Not replayed: t_each#0 of order:1: it is away'),
        ('success', 'Replayed t_each#0 of order:2.'),
    ]


def test_skipping_may_cascade(client: Any, failed: TriggerManager):
    assert act(client, f'{INSTANCES}?status=failed', 'skip_with_cascade') == [
        ('success', 'Skipped t_each#0 of order:1.')
    ]
    assert [r.trigger for r in failed.storage.history][-1] == 't_each'


def test_sessions_are_cancelled(client: Any, failed: TriggerManager):
    assert act(client, SESSIONS, 'cancel') == [('success', 'Cancelled order:1.')]
    assert failed.storage.load().head.cancelled == 'by ann'
    assert statuses(failed)['t_join#0'] == 'abandoned'


BUTTONS: dict[str, tuple[str, str, Callable[[TriggerManager], Any]]] = {
    'replay': ('t_each#0', 'Replayed t_each#0.', lambda m: statuses(m)['t_each#0']),
    'skip': ('t_each#0', 'Skipped t_each#0.', lambda m: statuses(m)['t_each#0']),
    'cascade': ('t_each#0', 'Skipped t_each#0.', lambda m: statuses(m)['t_each#0']),
    'cancel': ('', 'Cancelled order:1.', lambda m: statuses(m)['t_join#0']),
}


@pytest.mark.parametrize(
    ('button', 'status'),
    [('replay', 'replayed'), ('skip', 'skipped'), ('cascade', 'skipped'), ('cancel', 'abandoned')],
)
def test_the_buttons_of_a_sessions_page(
    client: Any, failed: TriggerManager, button: str, status: str
):
    name, message, status_of = BUTTONS[button]
    page = page_of(client, 'order:1')
    assert f'value="{button}"' in client.get(page).content.decode()
    answer = client.post(page, {'what': button, 'instance': name}, follow=True)
    assert said(answer) == [('success', message)]
    assert status_of(failed) == status
    again = client.post(page, {'what': button, 'instance': name}, follow=True)
    assert [level for level, _ in said(again)] == ['success' if button == 'cancel' else 'error']


def test_an_unknown_button_does_nothing(client: Any, failed: TriggerManager):
    before = statuses(failed)
    page = page_of(client, 'order:1')
    assert said(client.post(page, {'what': 'explode'}, follow=True)) == []
    assert statuses(failed) == before


def test_what_was_done_is_in_the_log(client: Any, failed: TriggerManager):
    act(client, f'{INSTANCES}?status=failed', 'replay')
    act(client, SESSIONS, 'cancel')
    page = page_of(client, 'order:1')
    assert 'Cancelled order:1.' in text_of(client.get(page.replace('change', 'history')))


def test_sessions_are_deleted_after_a_question(
    client: Any, failed: TriggerManager, app: Celery, alias: str
):
    from celery_triggers.contrib.django.models import Entry, Instance

    session(app, 'order:2').start()
    chosen = ids(client, SESSIONS)
    asked = client.post(SESSIONS, {'action': 'delete_selected', '_selected_action': chosen})
    assert 'Are you sure' in asked.content.decode()
    assert failed.storage.exists
    assert act(client, SESSIONS, 'delete_selected', *chosen, post='yes') == [
        ('success', 'Deleted 2 sessions.')
    ]
    assert not failed.storage.exists
    assert Entry.objects.using(alias).count() == Instance.objects.using(alias).count() == 0


def test_one_session_is_deleted_from_its_page(client: Any, failed: TriggerManager):
    page = page_of(client, 'order:1').replace('change', 'delete')
    assert 'Are you sure' in client.get(page).content.decode()
    assert failed.storage.exists
    assert said(client.post(page, {'post': 'yes'}, follow=True)) == [
        ('success', 'Deleted order:1.')
    ]
    assert not failed.storage.exists
    assert client.post(page, {'post': 'yes'}).status_code == 302


def test_a_session_with_a_gate_is_deleted_though_its_end_must_be_told(client: Any, app: Celery):
    """Which is sent before, and not once a transaction of the admin's is committed."""
    from celery_triggers import gate

    @app.task(name=f'after {app.conf.triggers_key_prefix}')
    def after() -> None: ...

    gate(after.s(), after=['never'], uid='order:1').apply_async()
    manager = session(app, 'order:1')
    assert manager.storage.load().head.gates == 1
    page = page_of(client, 'order:1').replace('change', 'delete')
    answer = client.post(page, {'post': 'yes'}, follow=True)
    assert said(answer) == [('success', 'Deleted order:1.')]


# ---------------------------------------------------------------- what nobody may do


def test_nobody_adds_or_edits_rows(client: Any, failed: TriggerManager):
    before = failed.storage._read(_everything())
    for url in (SESSIONS, INSTANCES):
        assert client.get(f'{url}add/').status_code == 403
        assert client.post(f'{url}add/', {'uid': 'x'}).status_code == 403
    page = page_of(client, 'order:1')
    client.post(page, {'uid': 'other', 'head': '{}', 'version': 'x', '_save': 'Save'})
    number = ids(client, INSTANCES)[0]
    client.post(f'{INSTANCES}{number}/change/', {'status': 'finished', '_save': 'Save'})
    assert client.post(f'{INSTANCES}{number}/delete/', {'post': 'yes'}).status_code == 403
    after = failed.storage._read(_everything())
    assert (before.version, before.rows) == (after.version, after.rows)


def _everything() -> Any:
    from celery_triggers.storages.records import Request

    return Request(whole=True)


def test_who_may_only_look_changes_nothing(users: Any, failed: TriggerManager):
    client = with_permissions(users, 'view_session', 'view_instance')
    assert uids(client) == ['order:1']
    page = page_of(client, 'order:1')
    shown = client.get(page).content.decode()
    assert 't_each#0' in shown
    assert 'name="what"' not in shown
    assert 'deletelink' not in shown
    for what in ('replay', 'cancel'):
        assert client.post(page, {'what': what, 'instance': 't_each#0'}).status_code == 403
    assert client.post(page.replace('change', 'delete'), {'post': 'yes'}).status_code == 403
    for url, action in ((SESSIONS, 'cancel'), (SESSIONS, 'delete_selected'), (INSTANCES, 'skip')):
        client.post(url, {
            'action': action, '_selected_action': [page.split('/')[-3]], 'post': 'yes'
        })
    assert statuses(failed)['t_each#0'] == 'failed'
    assert failed.storage.load().head.cancelled is None


def test_who_may_change_may_not_delete(users: Any, failed: TriggerManager):
    client = with_permissions(users, 'change_session', 'view_instance', 'change_instance')
    assert act(client, SESSIONS, 'cancel') == [('success', 'Cancelled order:1.')]
    assert act(client, f'{INSTANCES}?status=failed', 'replay')[0][0] == 'success'
    page = page_of(client, 'order:1')
    assert client.post(page.replace('change', 'delete'), {'post': 'yes'}).status_code == 403
    assert failed.storage.exists


def test_who_may_nothing_sees_nothing(users: Any, failed: TriggerManager):
    client = with_permissions(users)
    assert client.get(SESSIONS).status_code == 403
    assert client.get(INSTANCES).status_code == 403


def test_with_another_storage_the_admin_hides(client: Any, app: Celery, failed: TriggerManager):
    assert SESSIONS in client.get('/admin/').content.decode()
    app.conf.triggers_storage = 'sqlite:///elsewhere.db'
    assert 'celery_triggers' not in client.get('/admin/').content.decode()
    assert [client.get(page).status_code for page in (SESSIONS, INSTANCES)] == [403, 403]
    assert client.get(f'{SESSIONS}{failed.storage._sid}/change/').status_code == 302
