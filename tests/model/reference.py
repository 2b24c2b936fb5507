"""The rules of triggers, said again as naively as possible.

It keeps the whole session in plain lists and works everything out anew whenever it is
asked: no index, no counters, no slices. It shares no code with the engine. Time is what the
caller says it is.

Decisions that the rules leave open, made as the engine makes them:

- A waiting instance of a task that cannot be released before ``sessionFinalized`` does
  not hold the finalization up. (Any outcome trigger counts as one that may come.)
- A firing of ``andEvery`` goes to the first instance that waits for it, not to all.
- A leaf that counts looks when its trigger is fired, and when it is told how many it wants.
- What is overdue and has received a trigger already is not looked at when that comes again.
- Whether a session can be final while a gate waits is settled when the gate is applied.
- A firing reaches the gates that waited for it when it came, not those that it leads to.
- A copy of a gate has its ``within`` from its own beginning, and not its ``until``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.model.known import KNOWN_BUGS

RESOLVED = {'abandoned', 'finished', 'replayed', 'skipped'}
LOST = {'worker lost', 'time limit'}
FINALIZED = 'sessionFinalized'
OUTCOMES = (':failed', ':revoked', ':abandoned', ':expired')

Json = dict[str, Any]


class Refused(Exception):
    """What the rules do not allow."""


class Leaf(NamedTuple):
    """A leaf of a condition; ``times`` may be the key and the name of a kwarg."""

    trigger: str
    where: str | None
    key: str
    times: Any


#: The filters that tests use, said in Python: what cannot be compared does not match.
FILTERS: dict[str | None, Callable[[Json], bool]] = {
    None: lambda kwargs: True,
    'n > 40': lambda kwargs: isinstance(kwargs.get('n'), int) and kwargs['n'] > 40,
    'n > 4': lambda kwargs: isinstance(kwargs.get('n'), int) and kwargs['n'] > 4,
    'p.x < 5': lambda kwargs: isinstance(kwargs.get('p'), dict) and kwargs['p']['x'] < 5,
}


def leaf_of(value: Any) -> Leaf:
    if isinstance(value, str):
        return Leaf(value, None, value, None)
    key = value.get('as', value['trigger'])
    times = value.get('times')
    told_by = tuple(times['$kwarg']) if isinstance(times, dict) else times
    return Leaf(value['trigger'], value.get('where'), key, told_by)


def holds(condition: Any, got: Any) -> bool:
    if isinstance(condition, str):
        return condition in got
    if isinstance(condition, list):
        return all(holds(member, got) for member in condition)
    if 'trigger' in condition:
        return leaf_of(condition).key in got
    if 'any' in condition:
        return any(holds(member, got) for member in condition['any'])
    if 'all' in condition:
        return holds(condition['all'], got)
    return sum(holds(member, got) for member in condition['of']) >= condition['atLeast']


def leaves_of(condition: Any) -> set[Leaf]:
    if isinstance(condition, str) or 'trigger' in condition:
        return {leaf_of(condition)}
    if isinstance(condition, dict):
        condition = condition.get('any') or condition.get('all') or condition['of']
    return {leaf for member in condition for leaf in leaves_of(member)}


def with_looked_at(leaves: set[Leaf]) -> set[Leaf]:
    """And the triggers that tell how many, unless they are there."""
    looked_at = {leaf.times[0] for leaf in leaves if isinstance(leaf.times, tuple)}
    return leaves | {leaf_of(key) for key in looked_at - {leaf.key for leaf in leaves}}


def merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    both = {key: merge(under[key], over[key]) for key in under.keys() & over.keys()}
    return {**under, **over, **both}


class Task:
    """A trigger task: what it waits for."""

    def __init__(self, directives: Json):
        self.after = directives.get('after') or []
        self.every = directives.get('andEvery')
        self.unless = directives.get('unless') or []
        self.params = directives.get('withParams') or {}
        self.within = directives.get('within')
        self.wanted = [self.after, *([self.every] if self.every else [])]
        self.needed = with_looked_at(leaves_of(self.wanted))
        self.leaves = with_looked_at(leaves_of(self.wanted) | leaves_of(self.unless))
        self.triggers = {leaf.trigger for leaf in self.leaves}

    def could_run(self, triggers: set[str]) -> bool:
        return holds(self.wanted, {leaf.key for leaf in self.leaves if leaf.trigger in triggers})


class Gate(Task):
    """What a gate waits for; the application brings it, and not the configuration.

    ``keeps_open`` says whether the session cannot be final while it waits. Of its leaves that
    count, ``before`` has how many firings came before it and do not count.
    """

    def __init__(self, directives: Json, until: int = 0):
        super().__init__(directives)
        self.until = until
        self.keeps_open = True
        self.before: dict[str, int] = {}

    @property
    def makes_copies(self) -> bool:
        return self.every is not None


class Instance:
    """An execution of a trigger task, or a gate: what it received and how it stands."""

    def __init__(self, task: str, number: int, got: Json):
        self.task, self.number, self.got = task, number, got
        self.name = f'{task}#{number}'
        self.status = 'unstarted'
        self.reason = ''
        self.claimed = False
        self.attempt = self.depth = self.made = 0
        self.parent: str | None = None
        self.gate: Gate | None = None
        #: Known for gates alone; that of a copy is its own, and not known here.
        self.task_id: str | None = None
        #: The gate of which it is a copy.
        self.copy_of: Instance | None = None

    @property
    def is_template(self) -> bool:
        return self.gate is not None and self.gate.makes_copies and self.copy_of is None

    @property
    def keeps_open(self) -> bool:
        """Whether a gate that waits keeps its session from being final."""
        return self.gate is not None and self.gate.keeps_open


class Reference:
    """A session after any number of firings and outcomes."""

    def __init__(self, configuration: Json, finalizing: bool):
        self.tasks = {name: Task(value) for name, value in configuration.items()}
        self.finalizing = finalizing
        self.instances: list[Instance] = []
        #: ``(trigger, kwargs, cause, event id)`` of everything that was applied.
        self.history: list[tuple[str, Json, str | None, str | None]] = []
        self.released: list[str] = []
        self.events: dict[str, tuple[str, Json]] = {}
        self.cancelled = False
        self.queue: list[tuple[str, Json, str | None, str | None]] = []
        #: The storage's time in milliseconds.
        self.now = 0

    # ----------------------------------------------------------------- looking

    def of(self, task: str) -> list[Instance]:
        return [i for i in self.instances if i.task == task]

    def named(self, name: str) -> Instance:
        return next(i for i in self.instances if i.name == name)

    def ordered(self) -> list[Instance]:
        return sorted(self.instances, key=lambda i: (i.task, i.number))

    def past(self, trigger: str | None) -> list[Json]:
        return [kwargs for name, kwargs, _, _ in self.history if name == trigger]

    def task_of(self, instance: Instance) -> Task | None:
        return instance.gate or self.tasks.get(instance.task)

    def kwargs(self, instance: Instance) -> Json:
        task = self.task_of(instance)
        return merge(task.params, instance.got) if task else instance.got

    def waiting_gates(self) -> list[Instance]:
        return [i for i in self.ordered() if i.gate is not None and i.status == 'unstarted']

    def unresolved_tasks(self) -> list[str]:
        return [
            name
            for name in sorted(self.tasks)
            if not self.of(name) or any(i.status not in RESOLVED for i in self.of(name))
        ]

    # ------------------------------------------------------------------ firing

    def fire(self, trigger: str, kwargs: Json, event: str | None = None) -> bool:
        """Fire by hand; return whether it was a repeat."""
        if trigger == FINALIZED and self.finalizing:
            raise Refused('fired by the manager alone')
        if event in self.events:
            if self.events[event] != (trigger, kwargs):
                raise Refused('the event id stands for something else')
            return True
        if event is not None:
            self.events[event] = (trigger, kwargs)
        self.queue.append((trigger, kwargs, None, event))
        self.settle()
        return False

    def settle(self) -> None:
        while True:
            while self.queue:
                self.apply(*self.queue.pop(0))
            if not (self.finalizing and self.is_over()):
                return
            self.queue.append((FINALIZED, {}, None, None))

    def apply(self, trigger: str, kwargs: Json, cause: str | None, event: str | None) -> None:
        if not self.history:
            self.create_those_with_deadline()
        self.history.append((trigger, kwargs, cause, event))
        gates = [i for i in self.waiting_gates() if trigger in self.lacking(i)]
        for name in sorted({*self.tasks, *(gate.task for gate in gates)}):
            if name in self.tasks and trigger in self.tasks[name].triggers:
                self.reach(name, self.tasks[name], trigger, kwargs)
            for gate in gates:
                if gate.task == name and gate.status == 'unstarted':
                    self.pass_gate(gate, trigger, kwargs)

    def reach(self, name: str, task: Task, trigger: str, kwargs: Json) -> None:
        keys = {leaf.key for leaf in task.leaves if leaf.trigger == trigger}
        waiting = [
            i for i in self.of(name) if i.status == 'unstarted' and keys - set(i.got)
        ]
        lacking = [i for i in waiting if task.every not in i.got]
        for instance in waiting:
            self.give(instance, task, trigger, kwargs, every=instance in lacking[:1])
        if not self.of(name) or (trigger == task.every and not lacking):
            new = self.create(name, but=trigger)
            self.give(new, task, trigger, kwargs, every=True)
            waiting.append(new)
        for instance in waiting:
            self.judge(instance, task)

    def create_those_with_deadline(self) -> None:
        for name in sorted(self.tasks):
            if self.tasks[name].within is not None and not self.of(name):
                self.judge(self.create(name, but=None), self.tasks[name])

    def give(self, instance: Instance, task: Task, trigger: str, kwargs: Json, every: bool) -> None:
        before = set(instance.got)
        for leaf in task.leaves:
            plain = leaf.trigger == trigger and leaf.times is None and leaf.key not in before
            if plain and FILTERS[leaf.where](kwargs) and (every or leaf.key != task.every):
                instance.got[leaf.key] = kwargs
        self.count(instance, task, {trigger}, before)

    # ------------------------------------------------------------------- gates

    def apply_gate(
        self, name: str, task_id: str, directives: Json, until: int = 0, fresh: bool = False
    ) -> bool:
        """Apply a gate; return whether it was applied before."""
        if name in self.tasks:
            raise Refused('a trigger task has this name')
        if task_id in (i.task_id for i in self.instances):
            return True
        gate = Gate(directives, until)
        instance = Instance(name, len(self.of(name)), {})
        instance.gate, instance.task_id, instance.made = gate, task_id, self.now
        gate.keeps_open = not gate.makes_copies and not self.comes_at_the_end(gate)
        self.instances.append(instance)
        if fresh:
            gate.before = {leaf.key: len(self.matching(leaf)) for leaf in gate.leaves}
        else:
            self.give_past(instance, gate)
        self.judge(instance, gate)
        self.settle()
        return False

    def lacking(self, instance: Instance) -> set[str]:
        """The triggers that may still reach a gate."""
        assert instance.gate is not None
        return {leaf.trigger for leaf in instance.gate.leaves if leaf.key not in instance.got}

    def pass_gate(self, instance: Instance, trigger: str, kwargs: Json) -> None:
        assert instance.gate is not None
        overdue = self.is_overdue(instance, instance.gate) and 'overdue copies' not in KNOWN_BUGS
        if instance.is_template and trigger == instance.gate.every and not overdue:
            new = self.copied(instance, trigger, kwargs)
            self.judge(new, new.gate or instance.gate)
        self.give(instance, instance.gate, trigger, kwargs, every=False)
        self.judge(instance, instance.gate)

    def copied(self, template: Instance, trigger: str, kwargs: Json) -> Instance:
        """What a firing of ``andEvery`` asks for: what has come so far, and this."""
        assert template.gate is not None
        new = Instance(template.task, len(self.of(template.task)), {})
        # Its own, since it is another date by which it must have been released.
        new.gate = copy.copy(template.gate)
        new.gate.until, new.copy_of, new.made = 0, template, self.now
        new.gate.keeps_open = 'copies aside' not in KNOWN_BUGS and (
            not self.comes_at_the_end(new.gate)
        )
        new.got = {
            leaf.key: self.matching(leaf)[-1]
            for leaf in template.gate.leaves
            if leaf.key in template.got and self.matching(leaf)
        }
        self.instances.append(new)
        self.give(new, new.gate, trigger, kwargs, every=True)
        return new

    def comes_at_the_end(self, gate: Gate) -> bool:
        """Whether it cannot be released before ``sessionFinalized``."""
        return not gate.could_run(gate.triggers - {FINALIZED} - self.followers())

    def revoke_gate(self, instance: Instance) -> bool:
        if instance.gate is None or instance.status != 'unstarted':
            return False
        instance.status = 'revoked'
        self.end(instance, ':revoked')
        self.settle()
        return True

    # ---------------------------------------------------------------- deciding

    def matching(self, leaf: Leaf) -> list[Json]:
        """What was fired so far that a leaf would take."""
        return [k for k in self.past(leaf.trigger) if FILTERS[leaf.where](k)]

    def count(
        self, instance: Instance, task: Task, triggers: set[str | None], before: set[str]
    ) -> None:
        for _ in task.leaves:
            for leaf in task.leaves:
                if leaf.times is None or leaf.key in instance.got:
                    continue
                wanted, told = leaf.times, False
                if isinstance(wanted, tuple):
                    key, name = wanted
                    wanted = instance.got.get(key, {}).get(name)
                    told = key in instance.got and key not in before
                found = self.matching(leaf)
                looks = told or leaf.trigger in triggers
                so_often = len(found) - getattr(task, 'before', {}).get(leaf.key, 0)
                if looks and isinstance(wanted, int) and so_often >= wanted:
                    instance.got[leaf.key] = found[-1] if found else {}

    def create(self, name: str, but: str | None) -> Instance:
        instance = Instance(name, len(self.of(name)), {})
        instance.made = self.now
        self.instances.append(instance)
        self.give_past(instance, self.tasks[name], but)
        return instance

    def give_past(self, instance: Instance, task: Task, but: str | None = None) -> None:
        before = set(instance.got)
        for leaf in task.leaves:
            found = self.matching(leaf)
            later = leaf.trigger in (task.every, but) or leaf.times is not None
            if found and not later and leaf.key not in before:
                instance.got[leaf.key] = found[-1]
        self.count(instance, task, {*task.triggers} - {task.every, but}, before)

    def judge_all(self, name: str) -> None:
        task = self.tasks[name]
        for instance in self.of(name):
            if instance.gate is None:
                self.judge(instance, task)

    def judge(self, instance: Instance, task: Task) -> None:
        if instance.status != 'unstarted':
            return
        if self.is_overdue(instance, task):
            self.abandon(instance, task, ':expired')
        elif self.cancelled or (task.unless and holds(task.unless, instance.got)):
            self.abandon(instance, task)
        elif holds(task.wanted, instance.got) and not instance.is_template:
            self.release(instance)

    def is_overdue(self, instance: Instance, task: Task) -> bool:
        if isinstance(task, Gate) and task.until:
            return task.until <= self.now
        return task.within is not None and instance.made + task.within * 1000 <= self.now

    def expire(self, instance: Instance) -> bool:
        """The sweep looks at it."""
        task = self.task_of(instance)
        if task is None or instance.status != 'unstarted' or not self.is_overdue(instance, task):
            return False
        self.judge(instance, task)
        self.settle()
        return True

    def release(self, instance: Instance) -> None:
        instance.status = 'scheduled'
        self.released.append(instance.name)

    def abandon(self, instance: Instance, task: Task, outcome: str = ':abandoned') -> None:
        instance.status = 'abandoned'
        missing = sorted({leaf.trigger for leaf in task.needed if leaf.key not in instance.got})
        self.end(instance, outcome, missing=missing, received=sorted(instance.got))

    def end(self, instance: Instance, outcome: str, **facts: Any) -> None:
        kwargs = {'instance': instance.name, **facts} if outcome else facts
        self.queue.append((instance.task + outcome, kwargs, instance.name, None))

    # -------------------------------------------------------------- finalizing

    def is_over(self) -> bool:
        """Nothing that counts is unresolved, and something was fired."""
        if not self.history or self.past(FINALIZED):
            return False
        for instance in self.instances:
            later = instance.task in self.followers()
            if instance.gate is not None:
                later = not instance.keeps_open
            if instance.status not in RESOLVED and not (later and instance.status == 'unstarted'):
                return False
        # No task has an instance that counts, so a task without one counts only if the
        # application's own triggers are enough for it.
        own = self.all_triggers() - set(self.tasks)
        own = {t for t in own if t != FINALIZED and not t.endswith(OUTCOMES)}
        return not any(not self.of(n) and t.could_run(own) for n, t in self.tasks.items())

    def all_triggers(self) -> set[str]:
        """The triggers that a release of some task asks for."""
        return {leaf.trigger for task in self.tasks.values() for leaf in task.needed}

    def followers(self) -> set[str]:
        """The tasks that cannot be released before ``sessionFinalized``."""
        return set(self.tasks) - self.reachable()

    def reachable(self) -> set[str]:
        """The tasks that can be released without ``sessionFinalized``."""
        triggers = self.all_triggers() - {FINALIZED}
        found: set[str] = set()
        for _ in self.tasks:
            got = {t for t in triggers if t not in self.tasks or t in found}
            found = {name for name, task in self.tasks.items() if task.could_run(got)}
        return found

    # ---------------------------------------------------------------- outcomes

    def open(self, instance: Instance, token: bool = True) -> bool:
        """Whether a delivery may end it; one without the claim only while nobody has it."""
        return instance.status == 'scheduled' or (instance.status == 'running' and token)

    def finish(self, instance: Instance, result: Json) -> bool:
        late = instance.status == 'failed' and instance.reason in LOST
        if not (late or self.open(instance)):
            return False
        instance.status = 'finished'
        self.end(instance, '', **result)
        self.settle()
        return True

    def fail(self, instance: Instance, reason: str, token: bool) -> bool:
        if not self.open(instance, token):
            return False
        instance.status, instance.reason = 'failed', reason
        self.end(instance, ':failed')
        self.settle()
        return True

    def revoke(self, instance: Instance, token: bool) -> bool:
        if not self.open(instance, token):
            return False
        instance.status = 'revoked'
        self.end(instance, ':revoked')
        self.settle()
        return True

    def claim(self, instance: Instance) -> bool:
        if instance.status not in ('scheduled', 'running'):
            return False
        instance.status = 'running'
        return True

    def back(self, instance: Instance, attempts: int) -> bool:
        """A retry or a requeue."""
        if instance.status != 'running':
            return False
        instance.status = 'scheduled'
        instance.attempt += attempts
        return True

    def skip(self, instance: Instance) -> bool:
        """Its code skips it."""
        if not self.open(instance):
            return False
        instance.status = 'skipped'
        self.settle()
        return True

    def replay(self, instance: Instance, kwargs: Json, by_hand: bool) -> bool:
        fits = instance.status in ('failed', 'revoked') if by_hand else self.open(instance)
        if not fits or self.task_of(instance) is None:
            return False
        instance.status = 'replayed'
        got = {**copy.deepcopy(instance.got), **kwargs}
        new = Instance(instance.task, len(self.of(instance.task)), got)
        new.parent, new.depth = instance.name, instance.depth + 1
        new.gate, new.task_id, new.copy_of = instance.gate, instance.task_id, instance.copy_of
        self.instances.append(new)
        self.release(new)
        self.settle()
        return True

    def skip_by_hand(self, instance: Instance, cascade: Json | None) -> bool:
        if instance.status not in ('failed', 'revoked'):
            return False
        instance.status = 'skipped'
        if cascade is not None:
            self.end(instance, '', **cascade)
        self.settle()
        return True

    def set_status(self, instance: Instance, status: str, cascade: Json | None) -> bool:
        before = instance.status
        released = before in ('scheduled', 'running')
        allowed = (
            (status in RESOLVED and before not in RESOLVED)
            or (status == 'failed' and released)
            or (status == 'revoked' and (released or before == 'unstarted'))
        )
        if not allowed:
            return False
        instance.status, instance.reason = status, 'by hand'
        if cascade is not None:
            self.end(instance, '', **cascade)
        if status in ('failed', 'revoked'):
            self.end(instance, f':{status}')
        elif status == 'abandoned' and before == 'unstarted':
            self.abandon(instance, instance.gate or self.tasks[instance.task])
        self.settle()
        return True

    # ----------------------------------------------------------- configuration

    def update(self, configuration: Json, apply_past: bool) -> None:
        self.tasks.update({name: Task(value) for name, value in configuration.items()})
        for instance in self.ordered():
            task = self.tasks.get(instance.task)
            if instance.status != 'unstarted' or task is None or instance.gate is not None:
                continue
            if apply_past:
                self.give_past(instance, task)
            self.judge_all(instance.task) if self.last_of(instance) else None
        for name in sorted(configuration) if apply_past else ():
            task = self.tasks[name]
            if self.of(name):
                continue
            for kwargs in self.past(task.every):
                new = self.create(name, but=task.every)
                self.give(new, task, str(task.every), kwargs, every=True)
            if not self.of(name) and any(self.past(t) for t in task.triggers):
                self.create(name, but=None)
            self.judge_all(name)
        if self.history:
            self.create_those_with_deadline()
        self.settle()

    def last_of(self, instance: Instance) -> bool:
        waiting = [i for i in self.of(instance.task) if i.status == 'unstarted']
        return instance is waiting[-1]

    def remove(self, unwanted: set[str]) -> bool:
        if unwanted - set(self.tasks):
            return False
        for instance in self.ordered():
            if instance.gate is None and instance.task in unwanted and (
                instance.status == 'unstarted'
            ):
                self.abandon(instance, self.tasks[instance.task])
        for name in unwanted:
            del self.tasks[name]
        self.settle()
        return True

    def cancel(self) -> None:
        self.cancelled = True
        for instance in self.ordered():
            if instance.status == 'unstarted':
                self.abandon(instance, instance.gate or self.tasks[instance.task])
        self.settle()
