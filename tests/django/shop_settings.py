"""The settings of a project with a real worker, which the environment completes."""

from __future__ import annotations

import os

from tests.django_settings import *  # noqa: F403
from tests.parts.servers import BROKER_DB, redis_url

CELERY_BROKER_URL = redis_url(BROKER_DB)
CELERY_TASK_DEFAULT_QUEUE = os.environ['TRIGGERS_TEST_SHOP']
CELERY_TASK_IGNORE_RESULT = True
CELERY_TRIGGERS_STORAGE = os.environ['TRIGGERS_TEST_SHOP_STORAGE']
CELERY_TRIGGERS_KEY_PREFIX = os.environ['TRIGGERS_TEST_SHOP']
CELERY_TRIGGERS_SWEEP_INTERVAL = 0.2
CELERY_TRIGGERS_LEASE = 5
