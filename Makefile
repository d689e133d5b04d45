# make demo      compress a small network and show what it costs before and after (FRAMEWORK=snntorch for snnTorch)
# make test      lint, types, tests and doctests: everything CI runs
#
# Both make .venv and install into it what is missing.

FRAMEWORK ?= spikingjelly
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@sed -n 's/^# //p; /^#$$/g; /^$$/q' Makefile

demo: $(INSTALLED)
	@$(BIN)/python examples/01_apply.py --framework $(FRAMEWORK)

test: lint
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# The first Python that is new enough; PYTHON=... chooses another.
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1
