"""Gates as signatures, without workers: what they say, and what they are here and now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state, chain, chord, group
from celery.canvas import Signature

from celery_triggers import all_of, any_of, fire, gate, kwarg, on
from celery_triggers.canvas import Gate
from celery_triggers.exceptions import InvalidConfiguration, TriggersError
from celery_triggers.manager.release import dispatch_endings
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.wiring import services_of


@pytest.fixture
def app() -> Iterator[Any]:
    app: Any = Celery(
        'canvas', broker='memory://', task_cls='celery_triggers:TriggerTask', set_as_current=False
    )
    app.conf.update(triggers_storage='memory://canvas', task_always_eager=True,
                    triggers_unheard='ignore')

    @app.task(name='add', shared=False)
    def add(x: Any, y: Any = 0) -> Any:
        return x + y

    @app.task(name='total', shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.trigger_task(after=['go'], name='ship')
    def ship(context: Any, previous: Any = None, *, fast: bool = False) -> Any:
        return {'got': context['go']['n'], 'previous': previous, 'fast': fast}

    app.finalize()
    MemoryStorageBackend.clear('memory://canvas')
    current = _state._tls.current_app
    app.set_current()
    yield app
    _state._tls.current_app = current
    MemoryStorageBackend.clear('memory://canvas')


def add(app: Any) -> Any:
    return app.tasks['add']


class TestTheSignature:
    def test_it_reads_the_same_as_a_method(self, app: Any):
        assert add(app).s(1, 2).gate(after=['a']) == gate(add(app).s(1, 2), after=['a'])
        assert gate(add(app), after=['a']) == gate(add(app).s(), after=['a'])

    def test_it_leaves_the_signature_alone_that_it_is_made_of(self, app: Any):
        sig = add(app).s(1).set(queue='q')
        before = json.dumps(sig)
        made = gate(sig, after=['a'])
        made.set(priority=3)
        made.link(add(app).s())
        assert json.dumps(sig) == before

    @pytest.mark.parametrize(
        'make',
        [
            lambda s: gate(s, after=['a']),
            lambda s: chain(s, gate(s, after=['a']), s),
            lambda s: group(gate(s, after=['a']), s),
            lambda s: chord([gate(s, after=['a']), s], gate(s, after=['b'])),
            lambda s: gate(chain(s, s), after=['a']),
            lambda s: gate(group(s, gate(s, after=['b'])), after=['a']),
            lambda s: gate(gate(s, after=['a']), after=['b']),
        ],
    )
    def test_it_survives_json(self, app: Any, make: Any):
        made = make(add(app).s(1, 2))
        again = Signature.from_dict(json.loads(json.dumps(made)), app=app)
        assert type(again) is type(made)
        assert json.loads(json.dumps(again)) == json.loads(json.dumps(made))
        if isinstance(made, Gate):
            assert again.spoken == made.spoken

    def test_a_clone_is_a_gate_of_its_own(self, app: Any):
        made = gate(add(app).s(1), after=['a'])
        clone: Any = made.clone((5,), {'y': 3}, queue='q')
        assert (type(clone), clone.args, clone.kwargs) == (Gate, (5, 1), {'y': 3})
        assert clone.options['queue'] == 'q'
        assert clone.spoken == made.spoken
        assert 'queue' not in made.options

    def test_placeholders_are_written_so_that_any_serializer_takes_them(self, app: Any):
        made = gate(add(app).s(kwarg('a', 'n'), y=[{'z': kwarg('a', 'm')}]), after=['a'])
        assert made.args == ({'$kwarg': ['a', 'n']},)
        assert made.kwargs == {'y': [{'z': {'$kwarg': ['a', 'm']}}]}
        deep = gate(chain(add(app).s(kwarg('a', 'n')), add(app).s()), after=['a'])
        assert '{"$kwarg": ["a", "n"]}' in json.dumps(deep)

    def test_a_malformed_placeholder_is_refused(self, app: Any):
        with pytest.raises(InvalidConfiguration, match=r'\$kwarg'):
            gate(add(app).s({'$kwarg': 'a'}), after=['a'])

    def test_it_says_what_it_is(self, app: Any):
        made = gate(add(app).s(1, y=2), after=['a'], unless=['b'])
        assert repr(made) == "gate(add(1, y=2), after=['a'], unless=['b'])"

    def test_its_condition_is_any(self, app: Any):
        made = gate(
            add(app).s(), after=all_of('a', on('b', where='n > 1', times=2)) | any_of('c', 'd'),
            unless=any_of('x', 'y'), within=3,
        )
        assert set(made.config.after) == {'a', 'b', 'c', 'd'}
        assert made.config.within == 3.0

    def test_a_task_stands_for_its_trigger(self, app: Any):
        assert gate(add(app).s(), after=[app.tasks['ship']]).config.after.to_json() == ['t_ship']
        assert gate(
            add(app).s(), after=any_of(app.tasks['ship'], 'a')
        ).config.after.to_json() == {'any': ['t_ship', 'a']}
        with pytest.raises(InvalidConfiguration, match='is no trigger task'):
            gate(add(app).s(), after=[add(app)])

    @pytest.mark.parametrize(
        ('wrong', 'error', 'text'),
        [
            ({'after': 'a'}, InvalidConfiguration, r"write \['a'\]"),
            ({'unless': ['a', 'b']}, InvalidConfiguration, 'any_of'),
            ({'within': 0}, InvalidConfiguration, 'within'),
            ({'after': [{'trigger': 'a', 'where': '('}]}, InvalidConfiguration, 'not understood'),
            ({'until': 5}, TypeError, 'aware datetime'),
            ({'until': datetime(2030, 1, 1)}, TypeError, 'aware datetime'),
            ({'uid': ''}, ValueError, 'uid'),
            ({'trigger_name': 'x:failed'}, InvalidConfiguration, 'outcome'),
            ({'trigger_name': ''}, InvalidConfiguration, 'empty'),
            ({'and_every': ['a']}, InvalidConfiguration, 'andEvery'),
        ],
    )
    def test_what_is_wrong_is_refused_where_it_is_written(
        self, app: Any, wrong: Any, error: Any, text: str
    ):
        with pytest.raises(error, match=text):
            gate(add(app).s(), **wrong)

    def test_only_signatures_can_be_gated(self):
        with pytest.raises(TypeError, match='takes a signature'):
            gate(5, after=['a'])

    @pytest.mark.parametrize(
        'join',
        [
            lambda s, g: chain(s, g, s).freeze(),
            lambda s, g: group(g, s).freeze(),
            lambda s, g: chord([s, s], g).freeze(),
            lambda s, g: chord([g, s], s).freeze(),
        ],
    )
    def test_one_of_many_copies_cannot_be_part_of_a_canvas(self, app: Any, join: Any):
        with pytest.raises(InvalidConfiguration, match='no single result'):
            join(add(app).s(1), gate(add(app).s(1), and_every='d'))

    def test_fire_is_no_call(self):
        with pytest.raises(TypeError, match=r'app\.triggers\.fire'):
            fire('order:1', 'paid')
        assert repr(fire.s('order:1', 'paid')).startswith('celery_triggers.fire(')
        assert fire.si('order:1', 'paid').immutable


class TestHereAndNow:
    """With ``task_always_eager``, or ``apply()``."""

    def test_one_whose_condition_holds_runs_at_once(self, app: Any):
        app.triggers.fire('s', 'a', {'n': 4})
        made = gate(add(app).s(1, kwarg('a', 'n')), after=['a'], uid='s', trigger_name='g')
        result = made.apply_async()
        assert (result.get(), result.state) == (5, 'SUCCESS')
        assert app.triggers.session('s').storage['g#0'].result == 5

    def test_its_task_may_raise(self, app: Any):
        result = gate(add(app).s(1, 'x'), uid='s', trigger_name='g').apply_async()
        assert result.state == 'FAILURE'
        assert str(app.triggers.session('s').storage['g#0'].status) == 'failed'

    def test_one_that_waits_is_ignored_and_runs_when_it_is_released(self, app: Any):
        result = gate(add(app).s(1, 2), after=['a'], uid='s', trigger_name='g').apply_async()
        assert result.state == 'IGNORED'
        app.triggers.fire('s', 'a')
        assert app.triggers.session('s').storage['g#0'].result == 3

    @pytest.mark.parametrize('released', [True, False])
    @pytest.mark.parametrize(
        ('make', 'value'),
        [
            (lambda a, g: chain(a.s(1, 1), g(a.s(5)), a.s(10)), 17),
            (lambda a, g: chain(a.s(1, 1), g(a.s(5))), 7),
            (lambda a, g: group(g(a.s(1, 1)), a.s(2, 2)), [2, 4]),
            (lambda a, g: chord([g(a.s(1, 1)), a.s(2, 2)], a.app.tasks['total'].s()), 6),
            (lambda a, g: chord([a.s(1, 1), a.s(2, 2)], g(a.app.tasks['total'].s())), 6),
            (lambda a, g: chain(a.s(1, 1), g(chain(a.s(1), a.s(2))), a.s(1)), 6),
        ],
    )
    def test_in_a_canvas(self, app: Any, make: Any, value: Any, released: bool):
        def gated(sig: Any) -> Any:
            return gate(sig, after=['a'], uid='s')

        canvas = make(add(app), gated)
        if released:
            app.triggers.fire('s', 'a')
            assert canvas.apply_async().get() == value
            assert canvas.apply().get() == value
            return
        with pytest.raises(TriggersError, match='nothing can wait'):
            canvas.apply_async()
        assert [*app.triggers.session('s').storage] == []

    def test_a_task_inside_one_may_apply_a_gate_of_its_own(self, app: Any):
        @app.task(name='applies', shared=False)
        def applies() -> str:
            return str(gate(add(app).s(1, 2), after=['a'], uid='s').apply_async().state)

        assert chain(applies.s(), add(app).s('!')).apply_async().get() == 'IGNORED!'

    def test_a_trigger_task_receives_its_context_then_what_it_was_given(self, app: Any):
        app.triggers.fire('s', 'go', {'n': 1})
        sig = gate(app.tasks['ship'].s(fast=True), after=['go'], uid='s', trigger_name='g')
        assert chain(add(app).s(1, 1), sig).apply_async().get() == {
            'got': 1, 'previous': 2, 'fast': True
        }

    def test_what_came_before_it_is_not_looked_through_for_placeholders(self, app: Any):
        app.triggers.fire('s', 'a', {'n': 'secret'})
        sig = gate(add(app).s([]), after=['a'], uid='s')
        given = [{'$kwarg': ['a', 'n']}]
        assert chain(add(app).s(given, []), sig).apply_async().get() == given

    def test_a_placeholder_without_a_value_fails_the_gate_alone(self, app: Any):
        gate(add(app).s(kwarg('a', 'n')), after=['a'], uid='s', trigger_name='g').apply_async()
        assert app.triggers.fire('s', 'a', {'m': 1}).released == ['g#0']
        failed = app.triggers.session('s').storage['g#0']
        assert failed.metadata['exception']['message'] == (
            "an argument is to be 'n' of 'a', which has only: m"
        )

    def test_until(self, app: Any):
        past = datetime.now(timezone.utc) - timedelta(seconds=1)
        made = gate(add(app).s(1), after=['a'], until=past, uid='s', trigger_name='g')
        made.apply_async()
        assert app.triggers.session('s').storage['g#0'].metadata['reason'] == 'deadline'

    def test_what_no_serializer_takes_is_refused(self, app: Any):
        with pytest.raises(TriggersError, match='triggers_serializer'):
            gate(add(app).s(object()), after=['a'], uid='s').apply_async()

    def test_fire_in_a_chain(self, app: Any):
        canvas = chain(add(app).s(1, 1), fire.s('s', 'go', {'more': 1}))
        assert canvas.apply_async().get() == {'more': 1, 'result': 2}
        assert app.triggers.session('s').storage.latest_kwargs['go'] == {'more': 1, 'result': 2}
        app.tasks['celery_triggers.fire'].apply_async(('s', 'go', {'n': 1})).get()
        assert app.triggers.session('s').storage.latest_kwargs['go'] == {'n': 1}

    @pytest.mark.parametrize('args', [(), ('s',), ('s', 'go', {}, 5)])
    def test_fire_with_other_arguments(self, app: Any, args: Any):
        result = app.tasks['celery_triggers.fire'].apply_async(args)
        assert 'takes (uid, trigger_name' in str(result.result)


def test_a_session_is_not_deleted_before_the_end_of_its_gates_was_sent(tmp_path: Path) -> None:
    app: Any = Celery('away', broker='redis://localhost:1/0', set_as_current=False)
    app.conf.triggers_storage = f'sqlite:///{tmp_path}/sessions.db'
    made = Signature('add', app=app).gate(after=['a'], uid='s', trigger_name='g')
    made.apply_async()
    with pytest.raises(TriggersError, match=r'results of g#0; call delete\(\) again'):
        app.triggers.delete('s')
    storage = app.triggers.session('s').storage
    assert str(storage['g#0'].status) == 'abandoned'
    services_of(app).dispatch = lambda releases: [
        storage.write(release.confirm_write()) for release in releases
    ]
    [gate_] = storage
    dispatch_endings(app.triggers.session('s'), [gate_], storage.load().head.incarnation)
    assert app.triggers.delete('s')
    assert not storage.exists


def test_a_gate_is_not_called(app: Any) -> None:
    with pytest.raises(TypeError, match='use apply_async'):
        gate(add(app).s(1), after=['a'])()


def test_as_a_callback_it_is_stored_once_however_often_its_task_is_delivered(app: Any) -> None:
    callback = gate(add(app).s(1), after=['a'], uid='s', trigger_name='g')
    for _ in range(2):
        add(app).apply_async((1, 1), link=callback, task_id='delivered')
    add(app).apply_async((1, 1), link=callback, task_id='another')
    storage = app.triggers.session('s').storage
    assert len({instance.task_id for instance in storage}) == len([*storage]) == 2
