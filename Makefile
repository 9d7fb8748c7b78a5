# `make demo`, `make test` and `make checks` install what they need into .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test checks lint types format clean

help:
	@echo "make install  set .venv up (PYTHON=python3.12 chooses another Python)"
	@echo "make demo     English and English-Clone, joint training against PreAlign, to runs/demo/report.html"
	@echo "make test     all tests"
	@echo "make checks   format, lint, types, tests: what CI runs"
	@echo "make format   put the code into format"
	@echo "make clean    remove .venv, caches and build output (runs/ stays)"

install: $(STAMP)

# Whatever the installation depends on makes it stale; torch comes first so that nothing else pulls another build of it.
$(STAMP): setup.py constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/english_clone/run.py

# Triton decides at its first import whether kernels are interpreted, so those tests need processes of their own.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile
test: $(STAMP)
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) tests/kernels

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

checks: lint types test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
