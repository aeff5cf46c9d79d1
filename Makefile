# make demo | test | lint | clean. Each creates what it needs, once: .venv with python -m venv and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check
TREE := pipeline actors jobs examples benchmarks tests

.PHONY: help demo test test-chaos test-jobs test-parts lint format clean

help:
	@echo "make demo    toy data, one job per model family, out/demo/report.html"
	@echo "make test    the test suite, doctests included"
	@echo "make lint    ruff, mypy and the direction of imports"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove .venv, caches and out/"

demo: $(VENV)/.runtime
	$(BIN)/python -m examples.demo

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory --keep-going -j3 test-chaos test-jobs test-parts

# Tests that run whole jobs wait for processes half of the time, so two lanes of them, each with Ray clusters of its own,
# run beside the other tests. What evens the lanes out comes last in the third.
CHAOS := tests/chaos tests/examples
JOBS := tests/jobs tests/test_readme.py
FAULTS := tests/faults

test-chaos: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations=15 $(CHAOS)

test-jobs: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations=15 $(JOBS)

test-parts: $(VENV)/.dev
	$(BIN)/python -m pytest -q --doctest-modules $(filter-out tests,$(TREE))
	$(BIN)/python -m pytest -q --durations=15 $(patsubst %,--ignore=%,$(CHAOS) $(JOBS) $(FAULTS))
	$(BIN)/python -m pytest -q --durations=15 $(FAULTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check $(TREE)
	$(BIN)/ruff format --check $(TREE)
	$(BIN)/lint-imports
	$(BIN)/mypy $(TREE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(TREE)
	$(BIN)/ruff format $(TREE)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last, so an interrupted install is tried again. torch goes in first and alone: a resolver that
# meets it among other packages may look past the local CPU build and fetch gigabytes of CUDA.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python 3.11 or newer (PYTHON=python3.12 make ...)")'
	@echo "Installing Tessera into $(VENV) (once, a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) --no-build-isolation -e .
	@touch $@

# torchvision is the oracle of the image tests. The index's build belongs to CUDA torch, so it comes without
# dependencies, and into a folder that only pytest looks into (pyproject.toml): transformers imports it where it can.
$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the test and lint tools"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(PIP) --no-deps --upgrade --target $(VENV)/oracle torchvision==0.28.0
	@touch $@
