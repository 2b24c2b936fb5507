"""A task runner that chooses the queue by the kind of session."""

from __future__ import annotations

from typing import Any

from celery_triggers.manager import Release
from celery_triggers.runners import CeleryTaskRunner


class KindTaskRunner(CeleryTaskRunner):
    """Sends what session ``order:42`` releases to the queue ``order``."""

    def send(self, release: Release, **options: Any) -> None:
        super().send(release, queue=release.manager.uid.partition(':')[0], **options)
