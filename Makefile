# Every target works by itself from a fresh clone; `make` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup test lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 16

setup: $(VENV)/.patched  ## virtual environment with pinned dependencies, torchtitan patched

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)/.patched: $(VENV)/.installed $(wildcard patches/*)
	$(BIN)/python -m torchtitan_ext.patching apply
	@touch $@

test: setup  ## the test suite (CPU, under 10 minutes on 2 cores)
	$(BIN)/python -m pytest

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and every run
	rm -rf $(VENV) outputs
