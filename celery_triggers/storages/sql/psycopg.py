"""Connections of psycopg's that do not wait for ever for a server that says nothing.

The timeouts of PostgreSQL are the server's own: one that was stopped, or a pooler between,
keeps none of them, and libpq waits for an answer without any limit.
"""

from __future__ import annotations

import selectors
from typing import Any

import psycopg

__all__ = ['connect']

#: The usual one takes three more system calls; gevent's is the only one where that patches.
_Selector: type[selectors.BaseSelector] = getattr(
    selectors, 'PollSelector', selectors.DefaultSelector
)


class _Connection(psycopg.Connection[Any]):
    """A connection that is closed when the server does not answer.

    Attributes:
        patience: For how many seconds the server may say nothing while it is asked.
    """

    patience: float | None = None

    def wait(self, gen: Any, *_args: Any, **_kwargs: Any) -> Any:
        """Do what a generator of psycopg's does: it yields what to wait for, and takes what came.

        What both are is what :mod:`selectors` calls them.
        """
        try:
            with _Selector() as selector:
                selector.register(self.pgconn.socket, selectors.EVENT_READ)
                wanted = next(gen)
                while True:
                    selector.modify(self.pgconn.socket, wanted)
                    wanted = gen.send(self._ready(selector))
        except StopIteration as end:
            return end.value
        except psycopg.Error:
            raise
        except BaseException:
            # A time limit of Celery's can strike here. Whatever came next would be taken for
            # the answer to something else.
            self.close()
            raise

    def _ready(self, selector: selectors.BaseSelector) -> int:
        for _, events in selector.select(self.patience):
            return events
        self.close()
        raise psycopg.OperationalError(
            f'the server has not answered for {self.patience:g} seconds'
        )


def connect(patience: float, arguments: Any, options: Any) -> Any:
    """Return a new connection that waits so many seconds for an answer."""
    connection = _Connection.connect(*arguments, **options)
    connection.patience = patience
    return connection
