# Everything runs in .venv, which the first target that needs it makes; nothing has to be activated.
# Another Python: make install PYTHON=/path/to/python3.12

VENV := .venv
PY := $(VENV)/bin/python
DONE := $(VENV)/.installed
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

# The version alone is not enough: a version manager's shim may not run, and venv may be missing.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FOUND = $(shell for p in $(CANDIDATES); do "$$p" -c '$(SUITABLE)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
NONE = Python 3.11, 3.12 or 3.13 with venv is needed; tried: $(CANDIDATES) (name one: make install PYTHON=/path/to/python3.12)

# Is .venv whole, and made with the Python asked for, if one is? Was it installed from this very directory (a copied
# or moved tree installs again)?
SAME = [ -z '$(PYTHON)' ] || [ "$$('$(PYTHON)' -V 2>&1)" = "$$($(PY) -V 2>&1)" ]
USABLE = $(shell { $(PY) -c '$(SUITABLE)' && $(PY) -m pip --version && { $(SAME); }; } >/dev/null 2>&1 && echo yes)
AGAIN := $(shell [ "$$(cat $(DONE) 2>/dev/null)" = '$(CURDIR)' ] && { $(SAME); } || echo again)

PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow mutants lint format tensorboard clean again

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(DONE) ## make .venv and install the package with its development tools

train: install ## train, evaluate and show the quickstart; resumes an unfinished run
	$(PY) scripts/train.py configs/quickstart.toml --run-dir runs/quickstart --continue

test: lint ## lint, types and the tests
	$(PY) -m pytest --numprocesses logical

test-slow: install ## all tests, the learning and stress tests among them
	$(PY) -m pytest -m ""

mutants: install ## change the code in a few thousand small ways and show those that no test notices (hours)
	$(PY) tests/mutants.py

# pyright is not to ask the network for a newer one.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
lint: install ## ruff and pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

format: install ## let ruff format and fix the code
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

tensorboard: install ## show the curves of everything in runs/
	@$(if $(wildcard runs/),,$(error there is no runs/ yet; make train makes the first run))
	$(PY) -m tensorboard.main --logdir runs --samples_per_plugin images=100

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist mutants .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so that an unfinished install is completed by the next call.
$(DONE): pyproject.toml constraints.txt $(AGAIN)
	@$(if $(USABLE),:,"$(or $(FOUND),$(error $(NONE)))" -m venv --clear $(VENV))
	$(PIP) --editable '.[dev]'
	@# memory-gym's pins have no wheels from Python 3.12 on; it runs just the same on what is installed by then.
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then set -x; $(PIP) --no-deps memory-gym; fi
	@echo '$(CURDIR)' > $@
