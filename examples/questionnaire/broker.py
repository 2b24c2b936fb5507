"""The embedded broker: kombu's file system transport, with messages that appear whole.

kombu writes a message into the very file that a worker may already be reading. With more
than one process at work a message now and then is read before it is there, and lost.
Here it is written under a name that no worker looks for, and then renamed.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any

from kombu.transport import filesystem

__all__ = ['Transport']


class Channel(filesystem.Channel):
    """A channel whose messages are there whole or not at all."""

    # The type stubs of kombu disagree with each other about its parameters.
    def _put(  # type: ignore[override]
        self, queue: str, payload: dict[str, Any], **kwargs: Any
    ) -> None:
        name = f'{round(time.monotonic() * 1000)}_{uuid.uuid4()}.{queue}.msg'
        path = os.path.join(self.data_folder_out, name)
        with open(f'{path}.part', 'w', encoding='utf-8') as file:
            json.dump(payload, file)
        os.replace(f'{path}.part', path)


class Transport(filesystem.Transport):
    """``broker_transport = 'examples.questionnaire.broker:Transport'``."""

    Channel = Channel
