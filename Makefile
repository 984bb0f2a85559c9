# Everything runs from .venv, which the first target creates; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check bench gpu format docs

demo: $(VENV)/installed
	$(BIN)/transom demo --overwrite

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-peers
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

docs: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks --page

# On a machine that has torch, pytest and a GPU but maybe no package index: no virtual environment.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH=src $(PYTHON) -m benchmarks --device cuda

# torch comes first: alone, pip resolves its range to the build the index prefers for this machine.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-peers: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet -e ".[dev,peers]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
