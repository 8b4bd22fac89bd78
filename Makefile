# make train    set up .venv and run the main job (EXPERIMENT=quickstart), on all GPUs or as 2 processes on the CPU
# make test     set up .venv and pass the tests
# make setup    only set up .venv, with the test dependencies
# make checks   lint, types, import rules
# make docs     build the documentation into site/
# make clean    remove what these made, except .venv and runs/
#
# Variables: PYTHON (3.11 or newer), EXPERIMENT, ARGS (more overrides), NPROC (processes), PYTEST_ARGS, PIP_ARGS (such as
# --extra-index-url=URL or --find-links=FOLDER, beside what your own pip configuration says).

PYTHON ?= python3
EXPERIMENT ?= quickstart
ARGS ?=
PIP_ARGS ?=
# No test is in a group: each goes to whoever is free next.
PYTEST_ARGS ?= -n 2 --dist loadgroup

VENV := .venv
BIN := $(VENV)/bin
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
# A power of two, up to eight GPUs: it divides the quickstart's batch.
NPROC ?= $(if $(filter-out 0,$(NUM_GPUS)),$(shell for n in 8 4 2 1; do [ $(NUM_GPUS) -ge $$n ] && echo $$n && break; done),2)
# One exact version where there is no GPU: a torch without CUDA that pip finds stays, and nothing later replaces it.
TORCH ?= $(if $(filter-out 0,$(NUM_GPUS)),torch>=2.11$(comma)<2.14,torch==2.13.0)
comma := ,

# Files are compiled on first import: compiling all of torch takes longer than installing it.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS)

.PHONY: train test setup checks docs clean

train: $(VENV)/.base
	$(BIN)/rung launch local --nproc $(NPROC) -- experiment=$(EXPERIMENT) $(ARGS)

# Bytecode is kept also where the environment says not to: without, each of many processes compiles torch anew.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

setup: $(VENV)/.dev

checks: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find trainer kernels configs launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a repeated call does nothing, a changed pyproject.toml installs again.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} is too old: use make PYTHON=python3.11 (or newer)")'
	@$(PYTHON) -m venv $(VENV) || { echo "This Python has no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing $(TORCH) into $(VENV)"
	@$(INSTALL) '$(TORCH)'
	@touch $@

$(VENV)/.base: pyproject.toml setup.py $(VENV)/.torch
	@echo "Installing rung and what it needs into $(VENV)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing the test dependencies into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "Installing the documentation tools into $(VENV)"
	@$(INSTALL) --editable '.[docs]'
	@touch $@
