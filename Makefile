# `make demo`: installs into .venv and runs the demonstration. `make test`: installs and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LOWEST := .venv-lowest
DOCS := .venv-docs

.PHONY: install demo test lint format types check ci-full house lowest peer-suites docs dist clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "diffusers_fisher needs Python 3.11 or newer; run make PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first: the constraint names the build that fits this project; a free choice may bring gigabytes.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/diffusers-fisher demo

test: install
	$(BIN)/python -m pytest -n logical --maxprocesses 8

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

# Figures of the package's structure: lines of code, the longest function, `Any`, circles of imports.
house: install
	$(BIN)/python tests/house.py

check: lint types test

# Everything that runs without a GPU and without a network: the slow tests too (the wheel in an empty environment,
# sixty kills, threads again and again). Half an hour and more on two cores. The tests of Ray need the extra [ray],
# which is installed here and not by `make install`, because it is large; without it they are skipped.
ci-full: lint types
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -n logical --maxprocesses 8 -m 'not gpu and not hub'

# The tests with the lowest versions that pyproject.toml allows. constraints.txt names torch's version, because a lower
# one may bring gigabytes. The lowest versions have wheels for Python 3.11, and not all of them for newer ones.
lowest: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip packaging
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt -e '.[dev]'
	$(LOWEST)/bin/python -m pytest -n logical --maxprocesses 8

# diffusers' own tests, with its classes and with ours: make peer-suites TESTS=../diffusers/tests/schedulers
peer-suites: install
	$(BIN)/python tests/peer_suites.py $(TESTS)

# The documentation's site, in site/. The sources are read and not imported, so the small environment has no PyTorch.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['docs'], sep='\n')" > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@

# Source distribution and wheel in dist/, as PyPI takes them.
dist: install
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) site outputs build dist *.egg-info
