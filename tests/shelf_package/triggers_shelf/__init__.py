"""A storage in files, a manager that keeps a log of firings, a runner with queues by kind."""
