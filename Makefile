# PYTHON, VENV, PIP_ARGS, PYTEST_ARGS, BENCH_ARGS, DEMO_ARGS and COMPAT_ARGS can be given on the
# command line or in the environment.
PYTHON ?= python3
VENV ?= .venv
# e.g. PIP_ARGS="--find-links DIR" for a folder of CPU builds of torch
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
COMPAT_ARGS ?=

PY := $(VENV)/bin/python
# one constraints file in every install: a later one never moves what an earlier one chose
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
INSTALL := $(PY) $(PIP_INSTALL) --constraint constraints.txt
CORE := $(VENV)/.installed-core
TRAIN := $(VENV)/.installed-train
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench
# the lower bounds of pyproject.toml, in an environment of their own
OLDEST_PY := $(VENV)-oldest/bin/python
OLDEST := $(VENV)-oldest/.installed
OLDEST_TESTS := tests/losses tests/ops tests/kernels/test_interpreter.py

PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo step check static quick test test-oldest coverage compat bench gpu report docs docs-serve lint types wheel clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(TRAIN) ## annotate, train DPO and T-REG, check, on a small world of known truth; DEMO_ARGS are passed on
	@$(PY) -m treg demo $(DEMO_ARGS)

step: $(CORE) ## one optimizer step on a toy head, fused and dense (needs torch, triton and numpy only)
	@$(PY) examples/one_step.py

check: static quick ## what a commit must pass: static checks and the quick tests

static: lint types ## ruff, the layout of the code, pyright

quick: $(DEV) ## the tests that are not marked slow or aot; PYTEST_ARGS are passed on
	@$(PYTEST) tests -m "not slow and not aot" $(PYTEST_ARGS)

test: $(DEV) ## all tests, two files at a time; PYTEST_ARGS="-k name" and the like are passed on
	@$(PYTEST) tests $(PYTEST_ARGS)

test-oldest: $(OLDEST) ## the tests of losses and ops on the oldest torch and triton (downloads gigabytes)
	@$(OLDEST_PY) -m pytest -q -n 2 --dist loadfile $(OLDEST_TESTS) -m "not aot" $(PYTEST_ARGS)

coverage: $(DEV) ## all tests, and which lines and branches they miss
	@$(PYTEST) tests --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

compat: ## tests in fresh environments, oldest to newest versions (hours, gigabytes); COMPAT_ARGS are passed on
	@$(PYTHON) tools/compat.py $(COMPAT_ARGS)

docs: $(DOCS) ## the pages, into site/; a broken link or a missing name is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs-serve: $(DOCS) ## the same in a browser, following what is edited
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

bench: $(BENCH) ## the benchmarks; BENCH_ARGS are passed on
	@$(PY) -m pytest benchmarks/ --benchmark-only $(BENCH_ARGS)

gpu: $(BENCH) ## what a GPU can tell, the most telling first, in eight minutes; again until nothing is left
	@$(PY) benchmarks/gpu_run.py $(BENCH_ARGS)

report: $(BENCH) $(TRAIN) ## tables and pictures of what is in benchmarks/results
	@$(PY) benchmarks/report.py

lint: $(DEV) ## ruff, and whether the code is laid out as ruff does
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .

types: $(DEV) ## pyright on treg/ without integrations/
	@$(PY) -m pyright --pythonpath $(PY)

wheel: $(DEV) ## sdist and wheel into dist/
	@$(PY) -m build --no-isolation

clean: ## remove what builds and tools left; the virtual environment stays
	rm -rf build dist site *.egg-info treg-demo .benchmarks .hypothesis .pytest_cache .ruff_cache .coverage htmlcov
	find treg kernels tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

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

# the pages are made from the sources: of the library nothing is imported
$(DOCS): pyproject.toml constraints.txt | $(PY)
	@echo "installing what the pages need into $(VENV)"
	@$(INSTALL) mkdocs-material 'mkdocstrings[python]' latex2mathml ruff
	@touch $@

$(OLDEST): pyproject.toml constraints-oldest.txt
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest $(OLDEST_PY)
	@echo "installing the oldest versions into $(VENV)-oldest"
	@$(OLDEST_PY) $(PIP_INSTALL) --constraint constraints-oldest.txt setuptools wheel
	@$(OLDEST_PY) $(PIP_INSTALL) --constraint constraints-oldest.txt --no-build-isolation \
	  --editable . pytest pytest-xdist hypothesis
	@touch $@

$(BENCH): $(CORE)
	@echo "installing the benchmark dependencies into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable '.[bench]'
	@touch $@
