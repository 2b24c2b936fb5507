"""Where a run keeps its things; the environment tells its worker processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ['Places']

_PREFIX = 'QUESTIONNAIRE_'


@dataclass(frozen=True)
class Places:
    """The URLs, the folder and the name of one run.

    Attributes:
        folder: Holds whatever of the run is in files, its logs included.
        storage: Where sessions live (``triggers_storage``).
        broker: Celery's broker. ``filesystem://`` is a folder below ``folder``.
        database: The SQLAlchemy URL of the database that the tasks write to.
        name: Names the queue and begins every key of the sessions, so that two runs on
            one server do not meet.
    """

    folder: str
    storage: str
    broker: str
    database: str
    name: str

    @classmethod
    def within(
        cls,
        folder: str | Path,
        storage: str | None = None,
        broker: str | None = None,
        database: str | None = None,
        name: str = 'questionnaire',
    ) -> Places:
        """Return places that are files in a folder where nothing else is asked for."""
        folder = Path(folder).resolve()
        return cls(
            str(folder),
            storage or f'sqlite:///{folder}/sessions.db',
            broker or 'filesystem://',
            database or f'sqlite:///{folder}/answers.db',
            name,
        )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Places:
        """Return what :meth:`to_environ` wrote; without that, files in ``.demo/``."""
        given = {
            key.removeprefix(_PREFIX).lower(): value
            for key, value in environ.items()
            if key.startswith(_PREFIX)
        }
        return cls.within(given.pop('folder', '.demo'), **given)

    def to_environ(self) -> dict[str, str]:
        """Return the environment variables by which other processes find the places."""
        return {f'{_PREFIX}{name.upper()}': value for name, value in vars(self).items()}

    @property
    def transport(self) -> str | None:
        """The kombu transport for the broker's URL; ``None``: the one that the URL names."""
        return 'examples.questionnaire.broker:Transport' if self._is_embedded else None

    @property
    def transport_options(self) -> dict[str, object]:
        """What kombu is told about the broker: for the embedded one, its folders."""
        if not self._is_embedded:
            return {}
        messages = f'{self.folder}/messages'
        return {
            'data_folder_in': messages,
            'data_folder_out': messages,
            'control_folder': f'{self.folder}/control',
            # On the same file system as the messages, so that to take one is to rename it.
            'store_processed': True,
            'processed_folder': f'{self.folder}/processed',
            # How long a worker without work sleeps before it looks again, in seconds.
            'polling_interval': 0.02,
        }

    @property
    def _is_embedded(self) -> bool:
        return self.broker.startswith('filesystem')

    def make_folders(self) -> None:
        """Create the folders that the embedded parts expect."""
        for name in ('messages', 'control', 'processed'):
            Path(self.folder, name).mkdir(parents=True, exist_ok=True)
