# make lab     the workbench in JupyterLab        (ARGS="--no-browser --port 8899")
# make demo    the main job in the terminal       (ARGS="--json answers.json")
# make doctor  what this machine has and lacks
# make test    every check: ruff, mypy, unit tests, notebooks, browser
# make peers   servers of other projects into .peers, once: half an hour, 5 GB; make test-peers then tests against them
#
# Each makes .venv and installs what it needs first; a second call skips that.
# PYTHON=python3.12 picks the interpreter that .venv is made with. `make venv` makes it alone, for when a certain build of
# torch should be installed into it first.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# One thread is the fastest for the small models of the tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv lab demo doctor test lint types unit gpu notebooks browser peers test-peers clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

lab: $(VENV)/.lab
	$(BIN)/autoglm-lab lab $(ARGS)

demo: $(VENV)/.core
	$(BIN)/autoglm-lab demo $(ARGS)

doctor: $(VENV)/.core
	$(BIN)/autoglm-lab doctor $(ARGS)

test: lint types unit gpu notebooks browser
	@$(BIN)/python .ci/count.py $(patsubst %,.make/%.xml,unit-1 unit-2 gpu notebooks browser)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Two processes at once, each with the same tests in the same order at every run.
FIRST := bench engine recipes server training

unit: $(VENV)/.test
	@mkdir -p .make
	@echo "$(PYTEST) tests/unit $(ARGS)"
	@$(PYTEST) $(FIRST:%=tests/unit/%) --junitxml=.make/unit-1.xml $(ARGS) > .make/unit-1.log 2>&1 & first=$$!; \
	trap 'kill $$first' INT TERM; \
	$(PYTEST) tests/unit $(FIRST:%=--ignore=tests/unit/%) --junitxml=.make/unit-2.xml $(ARGS); two=$$?; \
	wait $$first; one=$$?; cat .make/unit-1.log; \
	for code in $$one $$two; do test $$code -eq 0 || test $$code -eq 5 || exit $$code; done

gpu: $(VENV)/.test
	$(PYTEST) tests/gpu --junitxml=.make/gpu.xml $(ARGS)

notebooks: $(VENV)/.test
	$(PYTEST) --nbval-lax notebooks --junitxml=.make/notebooks.xml $(ARGS)

browser: $(VENV)/.test
	@command -v chromium > /dev/null || echo "No chromium on the PATH: the browser tests are skipped (apt-get install chromium)"
	$(PYTEST) tests/browser --junitxml=.make/browser.xml $(ARGS)

# SmolLM2 is read by the transformers beside it.
PEERS := transformers smollm2 vllm llama-server

peers: $(PEERS:%=.peers/%/.ready)

.peers/%/.ready: scripts/peers/install.sh
	@mkdir -p .peers
	PYTHON=$(PYTHON) scripts/peers/install.sh $* .peers/$*
	@touch $@

test-peers: $(VENV)/.test
	$(PYTEST) tests/peer $(ARGS)

venv: $(BIN)/python

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "There is no '$(PYTHON)': install Python >= 3.11, or name one with make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old, 3.11 is the least: name another with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	  { echo "$$($(PYTHON) --version) comes without the venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	@$(INSTALL) . && touch $@

$(VENV)/.lab: $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	@$(INSTALL) ".[lab,serve,train]" && touch $@ $(VENV)/.core

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	@$(INSTALL) ".[lab,serve,train,test]" && touch $@ $(VENV)/.lab $(VENV)/.core

clean:
	rm -rf $(VENV) .make build dist .mypy_cache .pytest_cache .ruff_cache
