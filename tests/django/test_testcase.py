"""Within Django's TestCase, which wraps each test in a transaction that is rolled back."""

from __future__ import annotations

from typing import Any

from celery import Celery
from django.test import SimpleTestCase, TestCase, TransactionTestCase

from celery_triggers.manager import TriggerManager
from tests import django_settings
from tests.django import databases

django_settings.set_up()

ALIAS = 'sqlite'


def make_app() -> Celery:
    app = Celery('in-testcase', broker='memory://', set_as_current=False)
    app.conf.update(
        triggers_storage=f'django://{ALIAS}', triggers_key_prefix='in-testcase',
        task_always_eager=True, task_store_eager_result=False,
    )

    @app.trigger_task(after=['paid', 'packed'], trigger_name='t_ship', name='ship')
    def ship(context: Any) -> Any:
        return {'box': context['packed']['box']}

    @app.trigger_task(after=[ship], trigger_name='t_tell', name='tell')
    def tell(context: Any) -> None:
        context.fire('told')

    @app.trigger_task(after=['broken'], trigger_name='t_broken', name='broken')
    def broken(context: Any) -> None:
        raise LookupError

    return app


class WithTables(SimpleTestCase):
    databases = {ALIAS}

    @classmethod
    def setUpClass(cls) -> None:
        databases.prepare(ALIAS)
        super().setUpClass()

    def setUp(self) -> None:
        self.app = make_app()
        self.addCleanup(self.app.close)

    def session(self) -> TriggerManager:
        found: TriggerManager = self.app.triggers.session('order:1')
        return found


class InTestCase(WithTables, TestCase):
    def test_a_firing_stays_pending_without_a_commit(self) -> None:
        assert self.app.triggers.fire('order:1', 'paid').pending
        assert not self.session().storage.exists

    def test_a_commit_is_made_believe(self) -> None:
        """All that the firing leads to comes within the block, tasks that run here included."""
        with self.captureOnCommitCallbacks(using=ALIAS, execute=True):
            self.app.triggers.fire('order:1', 'paid')
            self.app.triggers.fire('order:1', 'packed', {'box': 3})
            assert not self.session().storage.exists
        found = self.session().storage
        assert [r.trigger for r in found.history] == [
            'paid', 'packed', 't_ship', 't_tell', 'told'
        ]
        assert {i.name: str(i.status) for i in found} == {
            't_ship#0': 'finished', 't_tell#0': 'finished'
        }

    def test_nothing_is_left_in_the_inbox(self) -> None:
        from celery_triggers.contrib.django.models import Inbox

        with self.captureOnCommitCallbacks(using=ALIAS, execute=True) as callbacks:
            self.app.triggers.fire('order:1', 'paid')
            assert Inbox.objects.using(ALIAS).count() == 1
        # The firing, and what follows its being applied.
        assert len(callbacks) == 2
        assert Inbox.objects.using(ALIAS).count() == 0

    def test_other_changes_are_made_at_once_and_followed_up_by_the_commit(self) -> None:
        with self.captureOnCommitCallbacks(using=ALIAS, execute=True):
            self.app.triggers.fire('order:1', 'broken')
        session = self.session()
        assert str(session.storage['t_broken#0'].status) == 'failed'
        with self.captureOnCommitCallbacks(using=ALIAS, execute=True):
            session.replay_failed_instance('t_broken#0')
            assert str(session.storage['t_broken#1'].status) == 'scheduled'
        assert str(session.storage['t_broken#1'].status) == 'failed'

    def test_what_a_test_did_the_next_does_not_see(self) -> None:
        assert list(self.app.triggers.sessions()) == []


class InTransactionTestCase(WithTables, TransactionTestCase):
    """Commits are commits, so nothing is pending outside of a transaction."""

    available_apps = ['celery_triggers.contrib.django']

    def test_a_firing_is_applied_at_once(self) -> None:
        assert not self.app.triggers.fire('order:1', 'paid').pending
        assert self.session().storage.exists

    def test_the_tables_are_empty_again(self) -> None:
        assert list(self.app.triggers.sessions()) == []
