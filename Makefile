# Needs Python 3.10 or later and make; everything else is installed into .venv.

PYTHON ?= python3
ARGS ?=
# How many processes run the tests.
JOBS ?= 3
BIN := .venv/bin

.PHONY: help .venv demo test coverage lint bench docs chaos

help:
	@echo 'make demo    run the main example (ARGS="--respondents 100" for less of it)'
	@echo 'make test    run the tests (ARGS=tests/unit for some of them)'
	@echo 'make coverage  the same, and which lines of the package they ran'
	@echo 'make lint    ruff, mypy, import-linter and pyright'
	@echo 'make bench   run the benchmarks'
	@echo 'make chaos   kill things for an hour or so, and write down what came of it'
	@echo 'make docs    build the documentation into docs/_build/html'
	@echo 'make .venv   create the virtual environment with everything that these need'

.venv: .venv/dev.stamp

# Everything, which includes what the demo needs.
.venv/dev.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/demo.stamp $@

# The little that the demo needs, where nobody has asked for everything yet.
.venv/demo.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

demo: .venv/demo.stamp
	$(BIN)/python -m examples.questionnaire $(ARGS)

# In several processes, file by file: most tests wait for workers, and not for the processor.
# In the order of their names, since the files with few tests take longest.
TEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: .venv/dev.stamp
	$(TEST) $(ARGS)

# Apart, since it takes the processor half as much again.
coverage: .venv/dev.stamp
	$(TEST) --cov --cov-report term $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy celery_triggers examples/questionnaire examples/workers.py
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python examples/questionnaire examples/workers.py

bench: .venv/dev.stamp
	$(BIN)/python -m benchmarks $(ARGS)

# The long versions of what `make test` runs for some minutes. Its table goes into the docs.
chaos: .venv/dev.stamp
	TRIGGERS_SIMULATION_RUNS=100000 $(BIN)/python -m pytest -s tests/simulation
	$(BIN)/python -m tests.chaos --report docs/_data/chaos.md $(ARGS)

docs: .venv/dev.stamp
	$(BIN)/sphinx-build -W -b html docs docs/_build/html
