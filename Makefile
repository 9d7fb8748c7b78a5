# Targets install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-all test-rest checks lint types docs format clean

help:
	@echo "make install  create .venv (PYTHON=python3.12 chooses another Python)"
	@echo "make demo     run the English-Clone demo; writes runs/demo/report.html"
	@echo "make test     run the tests, in a few minutes"
	@echo "make test-all run all tests, also those marked slow"
	@echo "make checks   check format, lint, types, documentation, tests: what CI runs"
	@echo "make docs     build the documentation with command, recipe and API reference, to site/index.html"
	@echo "make format   format the code"
	@echo "make clean    remove .venv, caches and build output (runs/ stays)"

install: $(STAMP)

# torch is installed first so that no other requirement selects another build of it.
$(STAMP): setup.py constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/english_clone/run.py

# A file runs in one process, which makes its fixtures once; the longest files first (tests/support/longest_first.py).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Triton decides at its first import whether kernels are interpreted, so those tests need processes of their own.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/kernels

test: $(STAMP)
	$(PYTEST) -m "not slow"
	$(INTERPRETED) -m "not slow"

test-rest: $(STAMP)
	$(PYTEST) -m slow
	$(INTERPRETED) -m slow

# One session for all: fixtures of a file are made once for its quick and its slow tests.
test-all: $(STAMP)
	$(PYTEST)
	$(INTERPRETED)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# Every warning of Sphinx is an error; links between pages are checked.
docs: $(STAMP)
	$(BIN)/python docs/build.py site

checks: lint types docs test test-rest

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
