# Everything starts here. A fresh machine needs Python 3.11 or newer, make, git and a package index.

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python3.12 python3.13 python,\
            $(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WORKERS ?= 3

# Processes with one thread each use two cores better than one with two threads; one more, as tests wait for servers and disks.
# The tests and the demo never need the network: this says so to the Hugging Face libraries.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
PYTEST  := OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/pytest -n $(WORKERS) --dist worksteal -q

.DEFAULT_GOAL := help
.PHONY: help env demo cluster-demo test unit lint format slow docs reference wheel clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

env: $(READY) ## create .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; use make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned dependencies into $(VENV) (once; this can take some minutes)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## run the three stages on the embedded demo data into runs/demo, offline
	$(OFFLINE) $(BIN)/proper demo --out runs/demo

cluster-demo: $(READY) ## train on two workers and serve with two replicas, killing one of each; writes runs/cluster-demo
	$(OFFLINE) $(BIN)/python scripts/cluster_demo.py runs/cluster-demo

test: lint unit ## lint, types, imports and every test that is not slow

unit: $(READY) ## the tests that are not slow
	$(PYTEST) -m "not slow"

lint: $(READY) ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src experiments
	MYPYPATH=scripts $(BIN)/mypy --strict -p docs_reference
	$(BIN)/lint-imports

format: $(READY) ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(READY) ## the tests that take minutes
	$(PYTEST) -m slow

docs: $(READY) ## build the documentation site into site/; a broken link, anchor or page is an error
	PYTHONPATH=scripts $(BIN)/python -m zensical build --strict --clean

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

reference: $(READY) ## regenerate the reference pages of docs/: command line, config, API, HTTP, modules
	PYTHONPATH=scripts $(BIN)/python -m docs_reference

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
