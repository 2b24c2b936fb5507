"""What every storage promises, as tests that any package can run against its own.

``python -m pytest --pyargs celery_triggers.testing.conformance --triggers-storage URL``, or
the hook ``pytest_triggers_media`` in a ``conftest.py``.
"""
