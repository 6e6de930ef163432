PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup check test quickstart clean lock

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest

quickstart: setup
	$(BIN)/mmrl train configs/quickstart.yaml

# Pin what is installed now; run after changing the ranges in pyproject.toml.
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) .cache runs data build
