# `make help` lists the targets. ARGS goes to train.py or pytest: make plan ARGS="+recipe=mixtral_8x7b_ep8"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test test-long check plan mutants

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## make the virtual environment and install what training needs

train: setup  ## train the default: a small Mixtral on this machine's CPU, on two processes
	@$(BIN)/python train.py $(ARGS)

# Two at a time, a file's tests in one process: they share what the file has set up. In the order of tests/conftest.py.
test: $(VENV)/.tested  ## run the tests but for those that take minutes
	@$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.tested  ## run the tests that take minutes: Slurm, the drill, fuzzers
	@$(BIN)/python -m pytest -m long $(ARGS)

check: $(VENV)/.tested  ## look for what ruff finds: errors, unused names, formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

mutants: $(VENV)/.tested  ## put small faults into the pure modules and see whether tests notice: make mutants ARGS="config/rules/experts"
	@nice -n 19 $(BIN)/python tools/mutants.py $(ARGS)

plan: setup  ## print what a run would be: make plan ARGS="+recipe=mixtral_8x7b_ep8"
	@$(BIN)/python train.py trainer.mode=plan $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mixtrain needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say which: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch into $(VENV) ..."
	@$(PIP) torch
	@echo "installing Megatron-Core and the rest ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "installing pytest and ruff ..."
	@$(PIP) -e '.[dev]'
	@touch $@
