"""The simulated world: processes, the clock, and everything that can happen to them.

A process is a greenlet. It runs until it comes to a *point*, where it can be switched
away, killed or stopped for long; everything in between is atomic. Time passes only at
points and while everybody sleeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet

from tests.simulation.choices import Choices

#: The time at which every run begins, in milliseconds.
BEGINNING = 1_000_000_000

NEVER = 1 << 60


class Killed(BaseException):
    """Thrown into a process that dies; it does nothing to the world any more."""


class Violation(Exception):
    """A promise was broken."""

    def __init__(self, invariant: str, text: str):
        super().__init__(f'{invariant}: {text}')
        self.invariant = invariant


class Host:
    """What dies and stops together.

    Args:
        restart: Is called some time after the host has died.
    """

    def __init__(self, name: str, restart: Callable[[], None] | None = None):
        self.name = name
        self.restart = restart
        self.processes: list[Process] = []
        self.dead = False
        self.disturbed_at = 0
        self.on_death: Callable[[], None] | None = None


class Process:
    """A thread of control.

    Args:
        faults: The kinds of faults that can strike it, by the names in :class:`World`.

    Attributes:
        wake_at: When it goes on.
        stopped_until: Until when it is stopped (SIGSTOP), whatever else happens.
        on_death: Is called, in nobody's process, when it alone was killed.
    """

    def __init__(
        self,
        world: World,
        name: str,
        run: Callable[[], None],
        host: Host | None,
        faults: Sequence[str],
    ):
        self.world = world
        self.name = name
        self.host = host
        self.faults = faults
        # Whoever starts it, it always gives way to the scheduler.
        self.greenlet = greenlet(run, parent=world._hub)
        self.wake_at = world.now
        self.stopped_until = 0
        self.disturbed_at = 0
        self.dead = False
        self.actor: Any = None
        self.threads: list[Process] = []
        self.on_death: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return self.name


class World:
    """Chooses what happens next.

    Args:
        choices: Where every decision comes from.
        trace: Gets a line for everything that happens, if it is given.

    Attributes:
        now: The true time in milliseconds, which ``time.monotonic`` shows to everybody.
        offset: By how much the storage's clock differs.
        jumps_back: By how much it was set back in all.
        disturbed: Until when outages lasted, and when the clock jumped or a heartbeat was
            lost. One of them may harm nobody; several in a row may.
        healed: Whether nothing goes wrong any more, since ``healed_at`` (storage's time).
        rates: How likely each kind of fault is at each place where it can strike.
        happened: How often each fault and each noteworthy thing happened.
    """

    def __init__(self, choices: Choices, trace: list[str] | None = None):
        self.choices = choices
        self.trace = trace
        self.now = BEGINNING
        self.offset = 0
        self.jumps_back = 0
        self.jumped_at = 0
        self.disturbed: list[int] = []
        self.healed = False
        self.healed_at = 0
        self.switching = 0.0
        self.rates: dict[str, float] = {}
        self.happened: Counter[str] = Counter()
        self.processes: list[Process] = []
        self.current: Process | None = None
        self.violation: Violation | None = None
        self.lease = 4000
        self._hub = getcurrent()
        self._timers: list[tuple[int, Callable[[], None]]] = []
        self._serial = 0
        self._doomed: list[Process] = []

    # ------------------------------------------------------------------- looking

    @property
    def storage_time(self) -> int:
        return self.now + self.offset

    def serial(self, prefix: str) -> str:
        """Return a name that was not there before."""
        self._serial += 1
        return f'{prefix}{self._serial}'

    def note(self, text: str) -> None:
        if self.trace is not None:
            who = self.current.name if self.current else '-'
            clock = f'{(self.now - BEGINNING) / 1000:9.3f}'
            self.trace.append(f'{clock} {who:14} {text}')

    def break_promise(self, invariant: str, text: str) -> None:
        """Note a violation: the run ends, and is shrunk."""
        if self.violation is None:
            self.note(f'VIOLATION {invariant}: {text}')
            self.violation = Violation(invariant, text)
        raise self.violation

    # ------------------------------------------------------------------ choosing

    def strikes(self, *kinds: str) -> str | None:
        """Return the fault that strikes here, or ``None``."""
        if self.healed:
            return None
        kinds = tuple(kind for kind in kinds if kind in self.rates)
        if not kinds:
            return None
        chosen = self.choices.rarely(sum(self.rates[kind] for kind in kinds), len(kinds))
        if not chosen:
            return None
        kind = kinds[chosen - 1]
        self.happened[kind] += 1
        self.note(f'* {kind}')
        return kind

    def pick(self, *values: Any) -> Any:
        """Return one of the values, the first being the benign one."""
        return values[self.choices.draw(len(values))]

    # --------------------------------------------------- what processes call

    def point(self) -> None:
        """A place where the running process can be switched away, stopped or killed."""
        process = self.current
        if process is None:
            return
        if process.dead:
            raise Killed
        self.now += 1
        if process.faults:
            kind = self.strikes(*process.faults)
            if kind is not None:
                getattr(self, '_' + kind.replace(' ', '_'))(process)
        if self.choices.rarely(self.switching):
            self._yield(process, self.now)

    def sleep(self, seconds: float) -> None:
        """Let the running process sleep."""
        process = self.current
        if process is None:
            self.now += max(1, int(seconds * 1000))
            return
        if process.dead:
            raise Killed
        self._yield(process, self.now + max(1, int(seconds * 1000)))

    def block(self) -> None:
        """Let the running process wait until somebody wakes it."""
        process = self.current
        assert process is not None
        if process.dead:
            raise Killed
        self._yield(process, NEVER)

    def wake(self, process: Process) -> None:
        """Let a process that waits or sleeps go on."""
        process.wake_at = min(process.wake_at, self.now)

    def _yield(self, process: Process, wake_at: int) -> None:
        process.wake_at = wake_at
        self._hub.switch()
        self.current = process
        if process.dead:
            raise Killed

    # --------------------------------------------------------------- processes

    def spawn(
        self,
        name: str,
        run: Callable[[], None],
        host: Host | None = None,
        faults: Sequence[str] = (),
        delay: int = 0,
    ) -> Process:
        """Start a process."""
        process = Process(self, name, run, host, faults)
        process.wake_at += delay
        self.processes.append(process)
        if host is not None:
            host.processes.append(process)
        return process

    def spawn_thread(self, name: str, run: Callable[[], None], delay: int) -> None:
        """Start a thread of the running process, which dies with it."""
        owner = self.current
        if owner is None:
            run()
            return
        thread = self.spawn(f'{owner.name} {name}', run, owner.host, delay=delay)
        thread.actor = owner.actor
        owner.threads.append(thread)

    def later(self, milliseconds: int, call: Callable[[], None]) -> None:
        """Call something at a later time, in nobody's process."""
        self._timers.append((self.now + milliseconds, call))

    def kill(self, process: Process) -> None:
        """Kill a process; nobody is told."""
        process.dead = True
        self._doomed += [process, *process.threads]
        for thread in process.threads:
            thread.dead = True

    def kill_host(self, host: Host, *, sparing: Sequence[Process] = ()) -> None:
        """Kill everything on a host, and start it again later."""
        if host.dead:
            return
        host.dead = True
        host.disturbed_at = self.now
        for process in host.processes:
            if process not in sparing:
                self.kill(process)
        if host.on_death is not None:
            host.on_death()
        if host.restart is not None:
            self.later(0 if self.healed else self.pick(100, 1, 3 * self.lease), host.restart)

    # ------------------------------------------------------------------ faults

    def _kill_process(self, process: Process) -> None:
        self.kill(process)
        if process.on_death is not None:
            self.later(0, process.on_death)
        raise Killed

    def _kill_host(self, process: Process) -> None:
        assert process.host is not None
        self.kill_host(process.host)
        raise Killed

    def _stop_process(self, process: Process) -> None:
        self._stop(self.now + self._pause(), process)
        self._yield(process, self.now)

    def _stop_host(self, process: Process) -> None:
        assert process.host is not None
        self._stop(self.now + self._pause(), *process.host.processes)
        self._yield(process, self.now)

    def _kill_parent(self, process: Process) -> None:
        assert process.host is not None
        children = [p for p in process.host.processes if p.on_death is not None]
        self.kill_host(process.host, sparing=children)
        raise Killed

    @staticmethod
    def _stop(until: int, *processes: Process) -> None:
        for process in processes:
            process.stopped_until = process.disturbed_at = until

    def _pause(self) -> int:
        return int(self.lease * self.pick(1.1, 0.5, 2.5, 5))

    def _jump_ahead(self, process: Process) -> None:
        self._jump(self.pick(0.5, 1.1, 3, 10))

    def _jump_back(self, process: Process) -> None:
        self._jump(-self.pick(0.5, 1.1, 3))

    def _jump(self, leases: float) -> None:
        milliseconds = int(self.lease * leases)
        self.offset += milliseconds
        self.jumped_at = self.now
        self.disturbed.append(self.now)
        self.jumps_back += max(0, -milliseconds)
        self.note(f'the storage clock jumps by {milliseconds} ms')

    # --------------------------------------------------------------- scheduling

    def run(self, until: Callable[[], bool], limit: int) -> bool:
        """Let everything run until something holds; tell whether it came to hold in time.

        Args:
            limit: For how many milliseconds at most.

        Raises:
            Violation: A promise was broken meanwhile.
        """
        end = self.now + limit
        while not until():
            self._bury()
            self._fire_timers()
            ready = [p for p in self.processes if p.wake_at <= self.now >= p.stopped_until]
            if not ready:
                if not self._pass_time(end):
                    return False
                continue
            self._continue(ready[self.choices.draw(len(ready))])
            if self.violation is not None:
                raise self.violation
            if self.now > end:
                return False
        return True

    def _continue(self, process: Process) -> None:
        # Whoever ran goes behind the others, so that 0 gives everybody a turn.
        self.processes.remove(process)
        self.processes.append(process)
        process.wake_at = NEVER
        self.current = process
        try:
            process.greenlet.switch()
        except Killed:
            pass
        finally:
            self.current = None
        if process.greenlet.dead and process in self.processes:
            self.processes.remove(process)

    def _bury(self) -> None:
        """Let the killed die: they run their ``finally`` clauses, but do nothing any more."""
        while self._doomed:
            process = self._doomed.pop()
            if not process.greenlet.dead:
                self.current = process
                try:
                    if process.greenlet:
                        process.greenlet.throw(Killed)
                except Killed:
                    pass
                finally:
                    self.current = None
            if process in self.processes:
                self.processes.remove(process)

    def _fire_timers(self) -> None:
        if not self._timers:
            return
        due = [timer for timer in self._timers if timer[0] <= self.now]
        for timer in due:
            self._timers.remove(timer)
            timer[1]()

    def _pass_time(self, end: int) -> bool:
        dates = [max(p.wake_at, p.stopped_until) for p in self.processes]
        dates += [at for at, _ in self._timers]
        following = min(dates, default=NEVER)
        if following > end:
            self.now = end
            return False
        self.now = max(self.now, following)
        return True

    def heal(self) -> None:
        """From now on nothing goes wrong; who was stopped goes on."""
        self.healed, self.healed_at = True, self.storage_time
        self.note('---- everything is healed ----')
        for process in self.processes:
            process.stopped_until = 0
        # What is to be started again is started now, what was held back comes back.
        self._timers = [(self.now, call) for _, call in self._timers]

    def end(self) -> None:
        """Kill whoever is left."""
        for process in list(self.processes):
            self.kill(process)
        self._bury()
