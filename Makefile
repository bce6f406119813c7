# Two commands are all the set-up: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test check format lint types tests test-slow bench clean

demo: $(STAMP)
	$(BIN)/vardrop demo

test: lint types tests

check: format test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# A process a core, each with one thread: small tensors gain nothing from more.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# The peers state torchvision as a need but do not import it, so they come without what they state.
bench: $(STAMP)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])' | xargs $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/render.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch is installed first and by version: the plain name may bring gigabytes of accelerator libraries.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache
