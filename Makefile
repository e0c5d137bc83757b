# Two commands: `make quickstart` trains, evaluates and verifies an adapter; `make test` runs the tests. Each sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

quickstart: $(VENV)/.installed
	$(BIN)/lora-ft train recipes/quickstart.yaml --fresh

test: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-for-tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed-for-tests: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[dev,distributed]'
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e .
	touch $@

clean:
	rm -rf $(VENV) runs build dist

.PHONY: quickstart test test-slow lint clean
