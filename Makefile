# Every target works in a fresh clone; `make` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-eight test-gpu test-gpus soak bench docs patches lint coverage clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.patched  ## virtual environment with pinned dependencies, torchtitan patched

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	{ echo "PYTHON = $(PYTHON) is not Python 3.11 to 3.13 ($$($(PYTHON) --version 2>&1 | head -1)): install one of these" \
	"and name it, as in make $(or $(MAKECMDGOALS),setup) PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	{ echo "$(PYTHON) -m venv $(VENV) failed, as said above: install what it names, or give another VENV=FOLDER" >&2; exit 1; }
	@$(BIN)/pip install --constraint constraints.txt --editable ".[dev]" || \
	{ echo "pip could not install the packages of constraints.txt, as said above: check the network (and PIP_INDEX_URL," \
	"if there is a mirror) and the free disk, then call make again, which goes on" >&2; exit 1; }
	@touch $@

$(VENV)/.patched: $(VENV)/.installed $(wildcard patches/*.patch)
	$(BIN)/python -m torchtitan_ext patch apply
	@touch $@

demo: setup  ## the whole path on this machine, in minutes: dense, Lighthouse, three splits, table, plot, retrieval
	$(BIN)/python -m torchtitan_ext splits --configs configs/passkey
	$(BIN)/python -m torchtitan_ext table outputs/passkey
	for run in stage1 stage2-900; do $(BIN)/python -m torchtitan_ext niah outputs/passkey/$$run \
		--contexts 64 128 256 512 --output outputs/passkey/niah/$$run || exit; done

# Files of few tests take longest, because those launch processes: they would come last.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: lint  ## lint, then the test suite (CPU, under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-fast: setup  ## the tests that launch no processes, for the inner loop (under 90 seconds on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not eight and not slow"

test-eight: setup  ## FSDP and context parallelism on eight CPU processes: exact resume, and what one process trains
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m eight

test-gpu: setup  ## the kernels at full size, the scorers and the loss, on a CUDA device
	$(BIN)/python -m pytest -n 4 --dist worksteal tests/lighthouse tests/model/test_loss.py -m "gpu or not gpu"

test-gpus: setup  ## exact resume of six of the 530M recipe's layers across the switch, context parallelism, on two CUDA devices
	$(BIN)/python -m pytest -n 4 --dist loadgroup tests/test_context_parallel.py tests/train/test_resume.py -m gpu

soak: setup  ## 2,000 steps with 20 kills against an undisturbed run, on the CPU in 10 minutes
	$(BIN)/python scripts/soak.py

bench: setup  ## one attention layer beside dense SDPA and the floor
	$(BIN)/python scripts/bench_attention.py

docs: setup  ## docs/settings.md and the picture of docs/method.md, regenerated from the code
	$(BIN)/python scripts/write_settings.py
	$(BIN)/python scripts/draw_method.py

patches: setup  ## the first time build/torchtitan, a checkout with a commit per patch; then patches/ from its commits
	PYTHON=$(BIN)/python scripts/patches.sh

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: setup  ## lines of the package that the test suite runs, 96 % at least
	mkdir -p outputs/coverage && rm -f outputs/coverage/*
	OMP_NUM_THREADS=1 $(BIN)/coverage run $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:  ## remove the environment; runs in outputs/ stay
	rm -rf $(VENV)
