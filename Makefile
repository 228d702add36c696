# Everything runs from .venv; the versions are pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Its pins exclude ours: merges are compared with mergekit's across two environments.
PEERS := .venv-mergekit
# Further arguments, such as: make bench ARGS="--preset full --seeds 0"
ARGS ?=

.PHONY: help install peers bench test lint clean

help: ## Show what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Install into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "osrm needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

peers: $(PEERS)/.installed ## Install mergekit, which tests compare with, into .venv-mergekit

$(PEERS)/.installed: constraints-mergekit.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --constraint constraints-mergekit.txt mergekit
	touch $@

bench: install ## Train, merge and evaluate the embedded suite
	$(BIN)/osrm bench $(ARGS)

test: install peers ## Run all tests, a process for each core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

lint: install ## Linters, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove both environments and caches, keep runs
	rm -rf $(VENV) $(PEERS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
