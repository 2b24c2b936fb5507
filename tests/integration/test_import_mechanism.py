"""The three lines work as they stand, and what they cost an application without triggers."""

from __future__ import annotations

import textwrap

import pytest

from celery_triggers.wiring import services_of

THREE_LINES = textwrap.dedent("""
    from celery import Celery
    app = Celery('shop', broker='memory://', task_cls='celery_triggers:TriggerTask')
    app.conf.update(task_always_eager=True, triggers_storage='memory')

    @app.trigger_task(after=['paid', 'packed'])
    def ship(context):
        return {'amount': context['paid']['amount'], 'bound': context.uid}
""")

CHECK = textwrap.dedent("""
    app.triggers.fire('order:42', 'paid', {'amount': 99})
    app.triggers.fire('order:42', 'packed')
    assert app.triggers.session('order:42').storage['t_ship#0'].result == {
        'amount': 99, 'bound': 'order:42'}
    print('it works')
""")


class TestTheThreeLines:
    def test_under_plain_python(self, run_python):
        assert 'it works' in run_python(THREE_LINES + CHECK)

    @pytest.mark.parametrize(
        ('import_first', 'why'),
        [
            ('import celery_triggers', 'the package itself'),
            ('import kombu', 'kombu before celery'),
            ('import celery.app.base', 'the module of the class'),
            ('import celery.signals', 'the signals before the application'),
            ('import celery.app.task, celery.canvas', 'other parts of celery'),
            ('import celery_triggers.app', 'the floor that imports celery'),
            ('from celery_triggers import TriggerTask', 'a lazy name'),
        ],
    )
    def test_whatever_is_imported_first(self, run_python, import_first, why):
        assert 'it works' in run_python(f'{import_first}\n{THREE_LINES}{CHECK}')

    def test_under_the_celery_command(self, run_python, tmp_path):
        (tmp_path / 'shop.py').write_text(THREE_LINES)
        out = run_python('', '-m', 'celery', '-A', 'shop', 'report')
        assert 'triggers_storage' in out
        command = ('-m', 'celery', '-A', 'shop', 'inspect', 'ping', '-t', '0.1')
        out = run_python('', *command, expect=69)
        assert 'No nodes replied' in out

    def test_under_pytest(self, run_python, tmp_path):
        (tmp_path / 'shop.py').write_text(THREE_LINES)
        test = f'from shop import app\n\ndef test_it():\n{textwrap.indent(CHECK, "    ")}'
        (tmp_path / 'test_shop.py').write_text(test)
        out = run_python('', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'test_shop.py')
        assert '1 passed' in out

    def test_shared_trigger_tasks_are_on_every_application(self, run_python):
        script = textwrap.dedent("""
            from celery import Celery
            from celery_triggers import shared_trigger_task

            def make(name):
                app = Celery(name, broker='memory://', task_cls='celery_triggers:TriggerTask')
                app.conf.update(task_always_eager=True, triggers_storage=f'memory://{name}')
                return app

            before = make('before')
            finalized = make('finalized')
            finalized.finalize()

            @shared_trigger_task(after=['go'], sessions='shared:', max_retries=7)
            def shared(context):
                return {'amount': context['go']['amount']}

            @shared_trigger_task(after=[shared], sessions='shared:', bind=True)
            def bound(self, context):
                return {'app': self.app.main, 'amount': context['t_shared']['amount']}

            for app in (before, finalized, make('after')):
                app.set_current()
                app.triggers.fire('shared:1', 'go', {'amount': 3})
                found = app.triggers.session('shared:1').storage
                assert found['t_bound#0'].result == {'app': app.main, 'amount': 3}, (
                    app, found.debug_repr())
                assert set(app.triggers.workflow('shared:').tasks) == {'t_shared', 't_bound'}
                assert app.tasks[app.triggers.workflow('shared:').tasks['t_shared'].run
                                 ].max_retries == 7
            print('it works')
        """)
        assert 'it works' in run_python(script)

    def test_shared_trigger_tasks_can_be_stacked(self, run_python):
        """Without an application being made, and without two tasks of one name."""
        script = textwrap.dedent("""
            import warnings
            import celery
            from celery import Celery, _state
            from celery_triggers import shared_trigger_task

            warnings.simplefilter('error', celery.exceptions.DuplicateTaskNameWarning)

            @shared_trigger_task(after=['lost'], trigger_name='t_lost')
            @shared_trigger_task(after=['late'])
            def sorry(context):
                return context.instance_name

            assert sorry.__name__ == 'sorry'
            assert _state.default_app is None
            for wrong in (int, 42):
                try:
                    shared_trigger_task(after=['a'])(wrong)
                except TypeError as exc:
                    assert 'decorates functions' in str(exc)
                else:
                    raise AssertionError(wrong)
            try:
                shared_trigger_task(after=['a'], max_retries=1)(sorry)
            except TypeError as exc:
                assert 'max_retries' in str(exc)
            else:
                raise AssertionError('options')

            app = Celery('app', broker='memory://', task_cls='celery_triggers:TriggerTask')
            app.conf.update(task_always_eager=True, triggers_storage='memory://stacked')
            app.triggers.fire('order:1', 'lost')
            app.triggers.fire('order:1', 'late')
            found = app.triggers.session('order:1').storage
            assert found['t_lost#0'].result == 't_lost#0', found.debug_repr()
            assert found['t_sorry#0'].result == 't_sorry#0', found.debug_repr()
            print('it works')
        """)
        assert 'it works' in run_python(script)

    @pytest.mark.parametrize('how', [
        "include=['shop_tasks']",
        "config_source={'imports': ['shop_tasks']}",
        '',
    ])
    def test_a_process_that_only_fires_knows_the_tasks_of_the_workers(
        self, run_python, tmp_path, how
    ):
        """A session begins with the trigger tasks that the first process to fire knows."""
        discover = '' if how else "app.autodiscover_tasks(['things'])"
        (tmp_path / 'shop.py').write_text(textwrap.dedent(f"""
            from celery import Celery
            app = Celery('shop', broker='memory://', {how})
            app.conf.update(triggers_storage='memory', triggers_runner='threading')
            {discover}
        """))
        tasks = textwrap.dedent("""
            from shop import app

            @app.trigger_task(after=['paid'])
            def ship(context): ...
        """)
        (tmp_path / 'shop_tasks.py').write_text(tasks)
        (tmp_path / 'things').mkdir()
        (tmp_path / 'things' / '__init__.py').touch()
        (tmp_path / 'things' / 'tasks.py').write_text(tasks)
        script = (
            'from shop import app\n'
            'assert list(app.triggers.tasks) == ["t_ship"]\n'
            'print(app.triggers.fire("x", "paid").released)'
        )
        assert "['t_ship#0']" in run_python(script)

    def test_a_module_of_tasks_that_cannot_be_imported_is_an_error_of_the_firing(
        self, run_python
    ):
        script = textwrap.dedent("""
            from celery import Celery
            app = Celery('shop', broker='memory://', include=['missing_tasks'])
            for _ in range(2):
                try:
                    app.triggers.fire('x', 'paid')
                except Exception as exc:
                    print(type(exc).__name__, exc)
            assert list(app.triggers.sessions()) == []
        """)
        out = run_python(script)
        assert out.count('InvalidConfiguration') == 2
        assert "No module named 'missing_tasks'" in out

    def test_firing_while_the_modules_of_tasks_are_imported_is_warned_about(
        self, run_python, tmp_path
    ):
        (tmp_path / 'shop.py').write_text(textwrap.dedent("""
            from celery import Celery
            app = Celery('shop', broker='memory://', include=['early'])
        """))
        (tmp_path / 'early.py').write_text(textwrap.dedent("""
            from shop import app
            app.triggers.fire('x', 'paid')
        """))
        out = run_python('from shop import app\napp.triggers.fire("y", "paid")')
        assert 'its session begins with those that are known so far' in out

    def test_a_module_of_tasks_that_raises_is_an_error_of_the_firing(self, run_python, tmp_path):
        (tmp_path / 'broken.py').write_text('raise RuntimeError("settings missing")')
        script = textwrap.dedent("""
            from celery import Celery
            app = Celery('shop', broker='memory://', include=['broken'])
            try:
                app.triggers.fire('x', 'paid')
            except ValueError as exc:
                print(type(exc).__name__, exc)
        """)
        out = run_python(script)
        assert 'InvalidConfiguration' in out
        assert 'RuntimeError: settings missing' in out

    def test_the_typed_subclass_presets_the_task_class(self, run_python):
        script = textwrap.dedent("""
            from celery_triggers import Celery, TriggerTask
            app = Celery('shop', broker='memory://')
            @app.task
            def plain(): pass
            assert isinstance(plain, TriggerTask)
            print('it works')
        """)
        assert 'it works' in run_python(script)


class TestAHookThatFails:
    @pytest.fixture
    def without(self, tmp_path):
        """Return a folder whose ``sitecustomize`` keeps wrapt from being imported."""

        def make(error: str) -> str:
            (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent(f"""
                import sys

                class Blocker:
                    def find_spec(self, name, path=None, target=None):
                        if name == 'wrapt':
                            raise {error}('blocked: ' + name)

                sys.meta_path.insert(0, Blocker())
            """))
            return str(tmp_path)

        return make

    @pytest.mark.parametrize('error', ['ImportError', 'RuntimeError'])
    def test_kombu_and_celery_work_all_the_same(self, run_python, without, error):
        script = textwrap.dedent("""
            import kombu, celery
            app = celery.Celery('shop', broker='memory://')
            app.conf.task_always_eager = True

            @app.task
            def add(x, y):
                return x + y

            assert add.delay(1, 2).get() == 3
            assert kombu.serialization.dumps({}, 'json')[2] == '{}'
            assert not hasattr(celery.Celery, 'triggers')
            print('it works')
        """)
        assert 'it works' in run_python(script, PYTHONPATH=without(error))

    def test_a_missing_part_is_named_in_a_warning(self, run_python, without):
        out = run_python('import kombu.serialization', PYTHONPATH=without('ImportError'))
        assert 'celery_triggers could not attach itself to Celery' in out


PLAIN = textwrap.dedent("""
    import sys
    from celery import Celery, Task, signals
    app = Celery('plain', broker='memory://', backend='cache+memory://')
    app.conf.task_always_eager = True

    @app.task
    def add(x, y):
        return x + y

    assert add.delay(1, 2).get() == 3
    names = sorted(name for name, value in vars(signals).items() if hasattr(value, 'receivers'))
    for name in names:
        receivers = [str(key) for key, _ in getattr(signals, name).receivers or ()]
        mine = [key for key in receivers if 'celery_triggers' in key]
        if name == 'celeryd_init':
            assert len(mine) <= 1
        else:
            assert not mine, (name, mine)
        print(name, len(receivers) - len(mine))
    add = add._get_current_object()
    print('base', [f'{c.__module__}.{c.__qualname__}' for c in type(add).__mro__])
    print('request', add.Request, 'start', type(add).before_start is Task.before_start)
    loaded = sorted(name for name in sys.modules if name.startswith('celery_triggers'))
    print('loaded', loaded, file=sys.stderr)
    assert set(loaded) <= {'celery_triggers', 'celery_triggers.hook'}
""")


class TestAnApplicationWithoutTriggers:
    def test_it_is_as_if_the_package_were_not_installed(self, run_python, tmp_path):
        """No handler of a signal, no module of the package, no change to a task class."""
        with_package = run_python(PLAIN)
        (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent("""
            import importlib.metadata as metadata

            entry_points = metadata.entry_points

            def others(**parameters):
                return metadata.EntryPoints(
                    p for p in entry_points(**parameters) if 'triggers' not in p.value)

            metadata.entry_points = others
        """))
        without = run_python(PLAIN, PYTHONPATH=str(tmp_path))
        assert 'celery_triggers.hook' in with_package.split('loaded')[1]
        assert 'celery_triggers.hook' not in without.split('loaded')[1]
        assert with_package.split('loaded')[0] == without.split('loaded')[0]

    def test_a_worker_connects_nothing_for_it(self, run_python):
        """A worker wakes an application up that has a trigger task or names a storage."""
        script = textwrap.dedent("""
            from types import SimpleNamespace
            from celery import Celery, signals

            def start(app):
                signals.celeryd_init.send(
                    sender='w', instance=SimpleNamespace(app=app), conf=app.conf)
                return any('celery_triggers' in str(key)
                           for key, _ in signals.task_success.receivers or ())

            plain = Celery('plain', broker='memory://', backend='redis://localhost:6379/11')
            plain.task(lambda: None, name='nothing', shared=False)
            assert not start(plain)
            assert '_celery_triggers' not in vars(plain)
            named = Celery('named', broker='memory://')
            named.conf.triggers_storage = 'memory'
            assert start(named)
            print('it works')
        """)
        assert 'it works' in run_python(script)

    def test_it_has_the_attributes_only_once_it_asks_for_them(self, run_python):
        script = textwrap.dedent("""
            import sys
            from celery import Celery
            app = Celery('plain', broker='memory://')
            assert 'celery_triggers.app' not in sys.modules
            assert 'triggers' not in vars(app)
            app.triggers
            assert 'celery_triggers.app' in sys.modules
            assert app.triggers is app.triggers
            print('it works')
        """)
        assert 'it works' in run_python(script)


class TestDjango:
    def test_tasks_keep_what_django_gives_them(self, run_python, tmp_path):
        pytest.importorskip('django')
        (tmp_path / 'site_settings.py').write_text(textwrap.dedent("""
            SECRET_KEY = 'test'
            DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}}
            USE_TZ = True
            CELERY_TASK_ALWAYS_EAGER = True
            CELERY_TRIGGERS_STORAGE = 'memory'
        """))
        script = textwrap.dedent("""
            import os
            os.environ['DJANGO_SETTINGS_MODULE'] = 'site_settings'
            from celery import Celery
            app = Celery('site', broker='memory://', task_cls='celery_triggers:TriggerTask')
            app.config_from_object('django.conf:settings', namespace='CELERY')

            ran = []

            @app.task
            def plain(number):
                ran.append(number)

            @app.trigger_task(after=['paid'])
            def ship(context):
                ran.append(context['paid']['amount'])

            import django
            django.setup()
            from django.db import transaction
            with transaction.atomic():
                plain.delay_on_commit(1)
                plain.apply_async_on_commit((2,))
                assert ran == []
            assert ran == [1, 2]
            assert ship.delay_on_commit
            app.triggers.fire('order:42', 'paid', {'amount': 3})
            assert ran == [1, 2, 3]
            print('it works')
        """)
        assert 'it works' in run_python(script, PYTHONPATH=str(tmp_path))


class TestSettings:
    @pytest.fixture
    def app(self):
        import celery

        app = celery.Celery('settings', task_cls='celery_triggers:TriggerTask',
                            set_as_current=False)
        yield app
        app.close()

    def test_settings_are_found_under_a_namespace(self, app):
        class Config:
            CELERY_BROKER_URL = 'memory://'
            CELERY_TRIGGERS_STORAGE = 'redis://localhost:6379/11'
            CELERY_TRIGGERS_KEY_PREFIX = 'shop'
            CELERY_TRIGGERS_MANAGER = 'finalizing'
            CELERY_TRIGGERS_HISTORY_LIMIT = 7
            CELERY_TRIGGERS_LEASE = 90
            CELERY_TRIGGERS_UNHEARD = 'raise'

        app.config_from_object(Config, namespace='CELERY')
        settings = services_of(app).settings
        assert settings.storage_location() == ('redis', 'redis://localhost:6379/11')
        assert (settings.key_prefix, settings.manager) == ('shop', 'finalizing')
        assert (settings.history_limit, settings.lease, settings.unheard) == (7, 90, 'raise')

    def test_settings_without_a_namespace_are_lower_case(self, app):
        class Config:
            broker_url = 'memory://'
            triggers_storage = 'redis://localhost:6379/11'
            triggers_key_prefix = 'shop'

        app.config_from_object(Config)
        assert services_of(app).settings.storage_location() == ('redis', 'redis://localhost:6379/11')
        assert services_of(app).settings.key_prefix == 'shop'

    def test_a_setting_that_is_changed_later_counts(self, app):
        app.conf.triggers_key_prefix = 'one'
        assert services_of(app).settings.key_prefix == 'one'
        app.conf.triggers_key_prefix = 'two'
        assert services_of(app).settings.key_prefix == 'two'
        app.conf.update(triggers_key_prefix='three')
        assert services_of(app).settings.key_prefix == 'three'
        app.config_from_object({'triggers_lease': 90}, force=True)
        assert services_of(app).settings.lease == 90
