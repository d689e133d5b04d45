# make demo         compress a small network and show what it costs before and after (FRAMEWORK=snntorch for snnTorch)
# make test         lint, types, tests and doctests: everything CI runs
#
# make docs         the documentation as a site, in site/
#
# All make .venv and install into it what is missing. Before a release there are also:
#
# make test-floors  the tests with the lowest versions supported, in .venv-floors (Python 3.11 or 3.12)
# make test-newest  the tests with the newest versions of everything, in .venv-newest
# make dist         the wheel and the source distribution, checked, in dist/

FRAMEWORK ?= spikingjelly
PYTEST_ARGS ?=

VENV := .venv
FLOORS := .venv-floors
NEWEST := .venv-newest
BIN := $(VENV)/bin
DEV := $(VENV)/.installed
DEMO := $(VENV)/.installed-demo
PYTEST := python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test docs dist test-floors test-newest lint format clean
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# *//p' Makefile

demo: $(DEMO)
	@$(BIN)/python examples/01_apply.py --framework $(FRAMEWORK)

test: lint
	@$(BIN)/$(PYTEST)

docs: $(DEV)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; to read it: $(BIN)/python -m http.server --directory site"

test-floors: $(FLOORS)/.installed
	@$(FLOORS)/bin/$(PYTEST)

dist: $(DEV)
	@rm -rf dist
	@$(BIN)/python -m hatchling build
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

test-newest: $(NEWEST)/.installed
	@$(NEWEST)/bin/$(PYTEST)

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOORS) $(NEWEST) demo dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the demonstration needs is part of what development needs.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@ $(DEMO)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[all,examples]"
	@touch $@

$(FLOORS)/.installed: pyproject.toml constraints-floors.txt | $(FLOORS)/bin/python
	$(FLOORS)/bin/python -m pip install -c constraints-floors.txt -e ".[dev]"
	@touch $@

$(NEWEST)/.installed: pyproject.toml | $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager -e ".[dev]"
	@touch $@

# The first Python that is new enough; PYTHON=... chooses another. For the floors' numpy 3.13 is too new.
PYTHONS := python3 python3.11 python3.12 python3.13 python3.14
$(FLOORS)/bin/python: PYTHONS := python3.11 python3.12

$(BIN)/python $(FLOORS)/bin/python $(NEWEST)/bin/python:
	@for python in $(PYTHON) $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(@D:/bin=)"; \
			exec $$python -m venv $(@D:/bin=); \
		fi; \
	done; \
	echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1
