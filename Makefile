# `make help` lists what there is. All set-up happens in .venv; nothing outside this folder is touched.

PYTHON ?= python3
# More options for `bitdance sample` or pytest, as in: make sample ARGS="--seed 1"
ARGS ?=
# Test processes: two per core, since many tests wait for processes of their own (at most 8, since each loads torch).
WORKERS ?= $(shell $(PYTHON) -c "import os; print(2 * (os.cpu_count() or 1))" 2>/dev/null || echo 2)

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CHOICE := $(VENV)/.torch
UNFINISHED := $(VENV)/.unfinished
# gradio, playwright and a Pillow that gradio works with, before the packages of .venv: for the test of the page alone.
WEB := $(VENV)/web

# One exact torch, installed before the rest: see constraints.txt. A choice made with TORCH=... is kept by later calls.
ifdef TORCH
  CHOSEN := $(TORCH)
else
  CHOSEN := $(shell cat $(CHOICE) 2>/dev/null)
  TORCH := $(or $(CHOSEN),torch==2.13.0)
endif
# A variable of the environment reaches the shell as it is, whatever quotes it has.
export TORCH CHOSEN

# The stamp counts only if the Python behind it still runs and finds torch, the checkout has not moved (scripts and
# the editable install name its folder), and torch is the one asked for.
CURRENT := $(shell $(RUN) -c "import importlib.util as i; i.find_spec('torch').name" 2>/dev/null \
    && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P) $(TORCH)" ] && echo yes)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sample test test-all fuzz venv lint types benchmark wheel docs clean again

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-17s %s\n", $$1, $$2}'

sample: $(STAMP)  ## set up, then make a labelled grid of pictures with the built-in demo model in samples/
	$(VENV)/bin/bitdance sample --output samples $(ARGS)

test: $(STAMP)  ## set up, then run the quick tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --maxprocesses 8 $(ARGS)

test-all: $(STAMP) $(WEB)/.installed  ## set up, then run all tests, the slow ones too
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --maxprocesses 8 -m "" $(ARGS)
	@if [ -e $(WEB)/.installed ]; then \
	    echo "The page in a browser (skipped where there is no Chromium)"; \
	    OMP_NUM_THREADS=1 $(WEB)/bin/python -m pytest -q -m slow tests/test_web.py $(ARGS) || [ $$? = 5 ]; \
	fi

fuzz: $(STAMP)  ## set up, then give hostile files to the commands (ARGS="--tries 2000 --seed 1"; see docs/security.md)
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz.py $(ARGS)

venv: $(STAMP)  ## set up only: make .venv and install everything (PYTHON=python3.12, TORCH=torch==2.7.1 to choose)
	@echo "$(VENV) is ready"

lint: $(STAMP)  ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(STAMP)  ## check types
	$(RUN) -m mypy

benchmark: $(STAMP)  ## measure, and fail if a part is 15 % slower than at another revision (BASE=main)
	bash benchmarks/compare_revisions.sh $(or $(BASE),main) $(RUN)

wheel: $(STAMP)  ## build dist/bitdance-*.whl
	$(RUN) -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

docs: $(STAMP)  ## build the site, docs/_build/html/index.html
	$(RUN) -m pip install -q --disable-pip-version-check --no-input -c constraints.txt -e ".[docs]"
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove builds and caches (not .venv, not samples)
	rm -rf dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt $(if $(CURRENT),,again)
	@rm -f $(STAMP)
	@if [ -e $(UNFINISHED) ] || ! $(RUN) -c "$$OLD_ENOUGH" 2>/dev/null || ! $(RUN) -c "import importlib.metadata as m; m.version('pip')" 2>/dev/null; then \
	    command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is not found: install Python 3.10 or newer, or name one, as in: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }; \
	    "$(PYTHON)" -c "$$OLD_ENOUGH" || { echo "Python 3.10 or newer is needed and $(PYTHON) is $$("$(PYTHON)" -V 2>&1): install a newer one and name it, as in: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }; \
	    "$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { echo "$(PYTHON) lacks its venv module: install it (Debian and Ubuntu: sudo apt install python3-venv) and run make again" >&2; exit 1; }; \
	    echo "Making $(VENV) with $$("$(PYTHON)" -V)"; \
	    "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@touch $(UNFINISHED)
	@echo "Installing $$TORCH"
	@$(RUN) -m pip install --disable-pip-version-check --no-input -c constraints.txt $(TORCH)
	@echo "Installing bitdance and what it needs"
	@$(RUN) -m pip install -q --disable-pip-version-check --no-input -c constraints.txt -e ".[dev]"
	@if [ -n "$$CHOSEN" ]; then printf '%s\n' "$$CHOSEN" >$(CHOICE); fi
	@rm -f $(UNFINISHED)
	@printf '%s\n' "$$(pwd -P) $$TORCH" >$(STAMP)

PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))
$(WEB)/.installed: $(STAMP)
	@echo "Installing gradio and playwright for the test of the page"
	@$(RUN) -m venv --clear --without-pip $(WEB)
	@echo "import site; site.addsitedir(r'$$($(RUN) -c "$(PURELIB)")')" >"$$($(WEB)/bin/python -c "$(PURELIB)")/base.pth"
	@sed '/^pillow/d' constraints.txt >$(WEB)/constraints.txt
	@if $(WEB)/bin/python -m pip install -q --disable-pip-version-check --no-input -c $(WEB)/constraints.txt gradio playwright; \
	then touch $@; else echo "they cannot be installed: the page is not tested in a browser" >&2; fi

# Exits with status 1 before Python 3.10; written so that Python 2 can read it.
export OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
