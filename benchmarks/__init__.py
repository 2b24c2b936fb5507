"""Benchmarks of celery_triggers: ``python -m benchmarks``."""
