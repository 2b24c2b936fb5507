"""Sessions in files of one folder, for the processes of one host."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.storages import DocumentStorageBackend


class FileStorageBackend(DocumentStorageBackend):
    """Keeps each document in a file; ``triggers_storage='files:///some/folder'``."""

    key = 'files'

    def _open(self) -> None:
        if not self.url:
            raise StorageNotConfigured("say where the files are: 'files:///some/folder'")
        self.folder = Path(unquote(urlsplit(self.url).path))

    def load_document(self, name: str) -> tuple[str | None, Any]:
        try:
            text = self._path(name).read_text('ascii')
        except FileNotFoundError:
            return None, None
        except OSError as exc:
            raise StorageUnavailable(str(exc)) from exc
        # The text is its own version.
        return text, text

    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        path = self._path(name)
        try:
            with self._locked(path):
                if self.load_document(name)[1] != version:
                    return False
                if text is None:
                    path.unlink(missing_ok=True)
                else:
                    self._replace(path, text)
                return True
        except OSError as exc:
            raise StorageUnavailable(str(exc)) from exc

    def _path(self, name: str) -> Path:
        # A name may hold anything, which the name of a file may not.
        return self.folder / hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Let in one at a time; the system opens the lock of a process that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f'lock-{path.name[:2]}', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, path: Path, text: str) -> None:
        """Replace a file in one act, so that nobody reads half of it."""
        descriptor, fresh = tempfile.mkstemp(dir=self.folder)
        try:
            with open(descriptor, 'w', encoding='ascii') as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(fresh)
            raise
