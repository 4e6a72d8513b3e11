# `make demo` and `make test` set up everything they need, each by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Downloads are kept outside the checkout and reused.
CACHE  ?= $(or $(VENEER_CACHE),$(HOME)/.cache/veneer)
export VENEER_CACHE := $(CACHE)

.PHONY: demo test lint bench docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --cache-dir $(CACHE)/pip --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/veneer demo --output outputs/demo

test: $(VENV)/.ready lint
	$(BIN)/python -m veneer.samples minilm smollm2 movie-sentiment
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) outputs build dist
