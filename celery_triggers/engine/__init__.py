"""The rules, pure: no I/O, no clock, no randomness, no Celery.

May import ``exceptions`` alone. Time and identifiers arrive as arguments, so that the same
firings in the same order give the same session, whatever stores it and whoever fires.
"""
