"""The simulated broker: a queue that loses, doubles, delays and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kombu.exceptions import OperationalError

from tests.simulation.world import World


@dataclass(slots=True, eq=False)
class Message:
    """A message, or one delivery of it.

    Attributes:
        header: As the product made it.
        run: The Celery task's name.
        not_before: Its ETA, by the hosts' clocks; 0 without.
        visible_at: From when on the broker gives it to somebody.
        chord: Whether its task is a part of a chord.
        end: The arguments of the task that tells the end of a gate; ``None`` for others.
        id, retries: That task's own.
    """

    header: Mapping[str, Any]
    run: str
    not_before: int = 0
    visible_at: int = 0
    chord: bool = False
    end: Mapping[str, Any] | None = None
    id: str = ''
    retries: int = 0

    def again(self, not_before: float) -> Message:
        """Return the same message with an ETA."""
        return replace(self, not_before=int(not_before), visible_at=0)

    def __repr__(self) -> str:
        header = self.header
        if self.end is not None:
            return f'<{self.id}: the end of {header["instance"]} of {header["uid"]}>'
        return f'<{header["instance"]} attempt {header["attempt"]} of {header["uid"]}>'


class Broker:
    """Keeps messages until they are acknowledged, more or less."""

    def __init__(self, world: World):
        self.world = world
        self.queue: list[Message] = []
        self.unacked: list[Message] = []
        self.down_until = 0
        self.sent = 0
        self.listeners: list[Any] = []

    # ---------------------------------------------------------------- publishing

    def publish(self, message: Message) -> None:
        """Take a message.

        Raises:
            OperationalError: The broker does not answer; it may have the message.
            ValueError: It is up, and does not take the message.
        """
        world = self.world
        world.point()
        kind = world.strikes(
            'publishing fails', 'message lost', 'message doubled', 'message late',
            'confirmation lost', 'broker down', 'message refused',
        )
        if kind == 'broker down':
            self.down_until = world.now + int(world.lease * world.pick(0.5, 2))
        down = self.down_until > world.now and not world.healed
        if down or kind == 'publishing fails':
            raise OperationalError('the broker is down')
        if kind == 'message refused':
            raise ValueError('the broker does not take this message')
        self.sent += 1
        if kind != 'message lost':
            if kind == 'message late':
                message.visible_at = world.now + int(world.lease * world.pick(0.3, 1.5, 4))
            self._enqueue(message)
        if kind == 'message doubled':
            self._enqueue(replace(message))
        world.note(f'sent {message}')
        world.point()
        if kind == 'confirmation lost':
            raise OperationalError('the broker hung up')

    def _enqueue(self, message: Message) -> None:
        self.queue.append(message)
        for process in self.listeners:
            self.world.wake(process)

    # ----------------------------------------------------------------- consuming

    def take(self) -> Message | None:
        """Deliver a message to a worker, the oldest or any other."""
        world = self.world
        if self.unacked and world.strikes('visibility timeout'):
            again = self.unacked[world.choices.draw(len(self.unacked))]
            self._enqueue(replace(again, visible_at=0))
        if self.queue and world.strikes('broker forgets'):
            self.queue.clear()
        ready = self.ready()
        if not ready:
            return None
        message = ready[world.choices.draw(len(ready))]
        self.queue.remove(message)
        self.unacked.append(message)
        return message

    def ready(self) -> list[Message]:
        """Return the messages that can be delivered now."""
        world = self.world
        return [m for m in self.queue if m.visible_at <= world.now or world.healed]

    def acknowledge(self, message: Message) -> None:
        if message in self.unacked:
            self.unacked.remove(message)

    def requeue(self, message: Message) -> None:
        """Take a delivery back, to deliver the message again."""
        if message in self.unacked:
            self.unacked.remove(message)
            self._enqueue(replace(message, visible_at=0))

    def restore(self, messages: list[Message]) -> None:
        """Take back, sooner or later, what a host held that has vanished."""
        world = self.world
        delay = 0 if world.healed else int(world.lease * world.pick(0, 0.5, 2))
        world.later(delay, lambda: [self.requeue(message) for message in messages])

    @property
    def is_empty(self) -> bool:
        return not self.queue and not self.unacked
