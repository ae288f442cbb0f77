# Every target makes the virtual environment it needs in .venv, and is quick the second time.
#
#   make demo                   train, forget, compare with retraining; writes demo-report/
#   make test                   the tests, without the slow ones
#   make test-all               all tests
#   make bench                  the benchmarks, then one check for each claim of the README
#   make bench-state            state alignment alone, at most 20 minutes; ARGS=--quick takes one
#   make lint                   ruff and mypy; make format rewrites the files
#   make clean                  remove .venv and the caches
#
#   make test ARGS="-k digits"  passes ARGS on (to pytest, the demo or every benchmark)
#   make test TESTS=tests/datasets
#   make demo PYTHON=python3.12
#
# The environment variable JAXUNLEARN_DATA names the folder with the data sets. Tests that need it
# are skipped where it is unset. benchmarks/kernels.py compares with the peers that it finds:
# `.venv/bin/pip install -e '.[peers]'` installs all of them.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TESTS ?= --doctest-modules jaxunlearn tests
JOBS ?= 2

BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.stamp-environment
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py))) \
  $(filter-out benchmarks/claims/_%,$(sort $(wildcard benchmarks/claims/*.py)))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench bench-state lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '/^  *make/p'

demo: $(DEMO)
	$(BIN)/jaxunlearn demo $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(TESTS) $(ARGS)

test-all: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS) $(ARGS)

bench: $(DEV)
	@failed=; \
	for script in $(BENCHMARKS); do \
	  echo "== $$script"; \
	  $(BIN)/python "$$script" $(ARGS) || failed="$$failed $$script"; \
	done; \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi

bench-state: $(DEV)
	$(BIN)/python benchmarks/state_alignment.py $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENVIRONMENT):
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: no $(PYTHON) found. jaxunlearn needs Python 3.11 or newer: make <target> PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1). jaxunlearn needs Python 3.11 or newer: make <target> PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO): pyproject.toml $(ENVIRONMENT)
	@echo "Installing jaxunlearn into $(VENV): a minute or two, once."
	$(PIP) install -e '.[demo]'
	@touch $@

$(DEV): pyproject.toml $(ENVIRONMENT)
	@echo "Installing jaxunlearn and its tools into $(VENV): a minute or two, once."
	$(PIP) install -e '.[dev]'
	@touch $(DEMO) $@
