# On a fresh machine two commands do everything, set-up included:
#
#     make run     a local network of four nodes trains the built-in workload, then prints the result
#     make test    lint, format, strict types, import rules, tests
#
# Both need Python 3.11 to 3.13 and, the first time, the network. Neither needs root or a compiler. Once installed, nothing
# is fetched or installed again until constraints.txt or pyproject.toml change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
# An interpreter of your choice; by default the first on the PATH that is 3.11, 3.12 or 3.13.
PYTHON ?=
# torch comes by itself, with its dependencies, and only where $(VENV) has none. For another build, give its pin and
# its index, e.g. make TORCH="torch==2.13.0 --index-url ..." test
TORCH ?= torch==2.13.0
NODES ?= 4
RUN_DIR ?= p2pcoord-cluster/$(shell date +%Y%m%d-%H%M%S)
# Test files run at once by `make test`; each may start several processes.
JOBS ?= 2
# Simulation sweeps of test-long, as peers:seeds; about four minutes on two cores.
SWEEPS ?= 5:1..60 9:1..20 15:1..6 25:1..2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.p2pcoord-installed
# Wheels only, so that no compiler is ever asked for, but for the two packages that come as (pure Python) source. They and
# this package are built with the setuptools of the environment: build isolation would fetch another one.
WHEELS := --only-binary=:all: --no-binary=python-baseconv,varint --no-build-isolation

.PHONY: run test test-long lint format format-check types imports tests install clean

run: $(INSTALLED)
	$(BIN)/p2pcoord cluster --nodes $(NODES) --workload text --data-dir $(RUN_DIR)
	@echo "For comparison, without a network: a trigram table, and nodes that each train alone on their share for as many steps."
	$(BIN)/python -m benchmarks.text_alone --controls --replicas $(NODES)

test: lint format-check types imports tests

# pytest's exit code 5 says that no test is marked slow.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m slow || { code=$$?; [ $$code -eq 5 ] || exit $$code; }
	for sweep in $(SWEEPS); do \
	    $(BIN)/p2pcoord simulate --peers $${sweep%%:*} --seeds $${sweep##*:} --faults all --rounds 10 || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy --strict p2pcoord node simulations

imports: $(INSTALLED)
	$(BIN)/lint-imports --no-logo

tests: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

install: $(INSTALLED)

# The stamp is written last, so an interrupted installation starts again.
$(INSTALLED): constraints.txt pyproject.toml
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	python=""; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "p2pcoord needs Python 3.11, 3.12 or 3.13; tried: $(or $(PYTHON),python3 and python3.11 to 3.13)." \
	        "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$python"; \
	$$python -m venv $(VENV) || { echo "$$python cannot create virtual environments:" \
	    "install its venv module (on Debian and Ubuntu: python3-venv)." >&2; exit 1; }
	$(PIP) install --quiet --no-deps --only-binary=:all: $$(grep '^setuptools==' constraints.txt)
	$(PIP) install --quiet --no-deps $(WHEELS) -r constraints.txt
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
	    || $(PIP) install --prefer-binary $(TORCH)
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $(INSTALLED)

# The environment stays: remove $(VENV) by hand to install from nothing.
clean:
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
