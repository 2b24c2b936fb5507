"""One of several processes that fire into the same sessions.

Arguments: the number of this process, how many there are, and the uids' prefix and count.
"""

from __future__ import annotations

import random
import sys

import integration_app

PAGES = (1, 2, 3)


def firings(uid: str) -> list[tuple[str, str, dict[str, object]]]:
    """Return what happens in a session, in no particular order."""
    return [
        (uid, 'firstPageReceived', {'subject': uid}),
        (uid, 'questionnaireComplete', {}),
        *((uid, 'pageReceived', {'page': page}) for page in PAGES),
    ]


def main(number: int, processes: int, prefix: str, sessions: int) -> None:
    app = integration_app.from_environment()
    everything = [f for n in range(sessions) for f in firings(f'{prefix}{n}')]
    mine = everything[number::processes]
    random.Random(number).shuffle(mine)
    for uid, trigger, kwargs in mine:
        app.triggers.session(uid, manager='finalizing').fire(trigger, kwargs)


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
