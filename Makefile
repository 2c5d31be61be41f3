# PYTHON, VENV, PIP_ARGS, PYTEST_ARGS, BENCH_ARGS and DEMO_ARGS can be given on the command line or in the environment.
PYTHON ?= python3
VENV ?= .venv
# e.g. PIP_ARGS="--find-links DIR" for a folder of CPU builds of torch
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

PY := $(VENV)/bin/python
# one constraints file in every install: a later one never moves what an earlier one chose
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt
CORE := $(VENV)/.installed-core
TRAIN := $(VENV)/.installed-train
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo step test bench gpu report lint types wheel clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(TRAIN) ## annotate, train DPO and T-REG, check, on a small world of known truth; DEMO_ARGS are passed on
	@$(PY) -m treg demo $(DEMO_ARGS)

step: $(CORE) ## one optimizer step on a toy head, fused and dense (needs torch, triton and numpy only)
	@$(PY) examples/one_step.py

test: $(DEV) ## the tests, two files at a time; PYTEST_ARGS="-k name" and the like are passed on
	@$(PY) -m pytest -q -n 2 --dist loadfile tests $(PYTEST_ARGS)

bench: $(BENCH) ## the benchmarks; BENCH_ARGS are passed on
	@$(PY) -m pytest benchmarks/ --benchmark-only $(BENCH_ARGS)

gpu: $(BENCH) ## everything that a GPU can tell, in slices of nine minutes; again until nothing is left
	@$(PY) benchmarks/gpu_run.py $(BENCH_ARGS)

report: $(BENCH) $(TRAIN) ## tables and pictures of what is in benchmarks/results
	@$(PY) benchmarks/report.py

lint: $(DEV) ## ruff
	@$(PY) -m ruff check .

types: $(DEV) ## pyright
	@$(PY) -m pyright --pythonpath $(PY)

wheel: $(DEV) ## sdist and wheel into dist/
	@$(PY) -m build --no-isolation

clean: ## remove what builds and tools left; the virtual environment stays
	rm -rf build dist *.egg-info treg-demo .benchmarks .hypothesis .pytest_cache .ruff_cache .coverage htmlcov
	find treg kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# a system Python may lack ensurepip: its own pip then fills the environment
$(PY):
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); else \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet $(PIP_ARGS) pip; fi

# setuptools first, so that the project is built by the pinned one and not in an isolated environment
$(CORE): pyproject.toml constraints.txt | $(PY)
	@echo "installing the core into $(VENV)"
	@$(INSTALL) setuptools wheel
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(TRAIN): $(CORE)
	@echo "installing what training needs into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[train]'
	@touch $@

$(DEV): $(TRAIN)
	@echo "installing the test dependencies into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[train,dev]'
	@touch $@

$(BENCH): $(CORE)
	@echo "installing the benchmark dependencies into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[bench]'
	@touch $@
