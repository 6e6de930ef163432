PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed beside the base (see pyproject.toml); for example: make setup EXTRAS=dev,models
EXTRAS ?= dev

.PHONY: setup check test test-vllm test-quantized docs quickstart lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: this Python has no venv: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each, which take whole files, the longest first (the order is in tests/conftest.py).
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(PARALLEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration $(PARALLEL)

# vLLM in an environment of its own, MMRL_VLLM_PYTHON or what `mmrl engine install` has made; skipped where there is none.
test-vllm: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/vllm $(PARALLEL)

# Quantised bases. Their libraries lie beside the environment: in it, every process of every other test would import them.
QUANTIZED := .cache/quantized
test-quantized: $(QUANTIZED)/.installed
	PYTHONPATH=$(QUANTIZED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k quantized tests/unit/policy/test_quantized.py tests/unit/export

$(QUANTIZED)/.installed: Makefile $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QUANTIZED) bitsandbytes==0.50.2 torchao==0.18.0
	@touch $@

# Strict: a reference to nothing, or a warning, fails. The pages are in docs/_build/html.
docs: setup $(VENV)/.docs-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# The run prints its seconds and its peak resident memory last. A second quickstart gets a name of its own.
quickstart: setup
	@name=quickstart; [ ! -e runs/$$name ] || name=quickstart-$$(date +%Y%m%d-%H%M%S); \
	set -x; $(BIN)/mmrl train configs/quickstart.yaml --set run.name=$$name

# Pins what is installed now; run it after changing the ranges in pyproject.toml.
lock: setup $(VENV)/.docs-installed
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

# Leaves runs/ and data/ alone: they are yours.
clean:
	rm -rf $(VENV) .cache build dist docs/_build docs/_generated *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
