"""A session's life, step by step, told again when its process has died in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.engine.transitions import Status
from celery_triggers.sweep import Sweep
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import FakeApplication, Medium
from tests.documents.shelf import Died, missing_entries, superfluous_dates

UIDS = ('order:1', 'order:2')

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_next': {'after': ['t_join'], 'run': 'x'},
    't_late': {'after': ['never'], 'within': 3600, 'run': 'x'},
}

Step = Callable[['Story'], None]


@dataclass
class Story:
    """What happens to two sessions.

    Attributes:
        set_time: Sets the storage's time, in milliseconds.
        told: The steps that were acknowledged.
    """

    medium: Medium
    set_time: Callable[[int], None]
    told: list[str] = field(default_factory=list)
    now: int = 10**12

    def application(self) -> FakeApplication:
        return self.medium.application(TASKS)

    def steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        manager = self.medium.manager(self.application())
        other = self.medium.manager(self.application(), 'order:2')
        yield 'a', lambda: manager.fire('a', event_id='a')
        yield 'b', lambda: manager.fire('b', event_id='b')
        yield 'claimed', lambda: delivery(manager, 't_join#0').claim()
        yield 'finished', lambda: delivery(manager, 't_join#0').finish({'n': 1})
        yield 'delayed', lambda: manager.fire('late', countdown=600, event_id='late')
        yield 'other', lambda: other.fire('a', event_id='a')
        yield 'deleted', other.storage.delete
        yield 'again', lambda: other.fire('a', event_id='again')

    def tell(self) -> None:
        """Take the steps until the process dies."""
        self.set_time(self.now)
        try:
            for name, step in self.steps():
                step()
                self.told.append(name)
        except Died:
            return

    def check(self) -> None:
        """Nothing that was acknowledged is lost, and everything that is due is found."""
        application = self.application()
        manager = self.medium.manager(application)
        other = self.medium.manager(application, 'order:2')
        index = manager.storage._index  # type: ignore[attr-defined]
        assert missing_entries(index, UIDS) == []
        fired = [record.trigger for record in manager.storage.history]
        for step, trigger in {'a': 'a', 'b': 'b', 'finished': 't_join'}.items():
            assert fired.count(trigger) == 1 or step not in self.told, (step, fired)
        if 'delayed' in self.told:
            assert list(manager.storage.load().delayed) == ['late']
        events = [record.event_id for record in other.storage.history]
        if 'again' in self.told:
            assert events == ['again']
        assert len(events) <= 1
        self._sweep_all(application)
        for uid in UIDS:
            storage = self.medium.backend(uid, application)
            scheduled = [
                i.name for i in storage.instances.values() if i.status == Status.SCHEDULED
            ]
            assert set(scheduled) <= set(application.released), 'the sweep sends it'
        assert superfluous_dates(index, self.now) == []

    def repeat(self) -> None:
        """Do again what may have been lost, and come to the same end."""
        manager = self.medium.manager(self.application())
        for event in ('a', 'b'):
            manager.fire(event, event_id=event)
        fired = [record.trigger for record in manager.storage.history]
        assert (fired.count('a'), fired.count('b')) == (1, 1)

    def _sweep_all(self, application: FakeApplication) -> None:
        # Twice: what a first pass finds after a while judges nobody.
        for _ in range(2):
            self.now += 40_000
            self.set_time(self.now)
            sweep = Sweep(application, self.medium.storage_class, self.medium.url)
            while sweep.run().more:
                pass
