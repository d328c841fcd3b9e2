# Every target sets up what it needs: `make compare` or `make test` alone suffices after cloning.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup compare bench train-demo test lint format clean

help:
	@echo "make compare   measure exact attention by several methods on this machine (table and HTML report)"
	@echo "make bench     set it beside PyTorch's kernels and other peers"
	@echo "make train-demo  train a GPT of a million weights on Python's own text, and let it write"
	@echo "make test      lint and test"
	@echo "make lint      ruff, pyright, import-linter"
	@echo "make format    rewrite the sources in the project's style"
	@echo "make compile-all  compile every kernel configuration for sm_90 and keep what it needs (about an hour of one core)"
	@echo "make setup     create $(VENV) with everything; the targets above do so when needed"
	@echo "make clean     remove $(VENV) and caches"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tilewise needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	@touch $@

compare: $(STAMP)
	@$(BIN)/tilewise compare

bench: $(STAMP)
	@$(BIN)/tilewise bench

train-demo: $(STAMP)
	@rm -rf tilewise-demo
	@$(BIN)/tilewise train --out tilewise-demo
	@$(BIN)/tilewise generate tilewise-demo

test: lint
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto tests/backends/triton \
		tests/backends/hopper/test_hopper_backward_rows.py tests/bench/test_tuning.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

compile-all: $(STAMP)
	@$(BIN)/python tests/backends/triton/compile_all.py
	@$(BIN)/python tests/backends/hopper/compile_hopper.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
