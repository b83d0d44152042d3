# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8

.PHONY: demo test setup check operators lock bench clean

demo: setup
	@$(BIN)/python -m jobs demo

test: setup check
	@$(BIN)/python -m pytest

setup: $(VENV)/.installed operators

# The environment, made anew into the same folder whenever the lock changes.
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --requirement requirements.lock
	@touch $@

# A no-op where sources, compilers and torch are those of the last build.
operators: $(VENV)/.installed
	@$(BIN)/python -m cuda_ops build

check: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

bench: setup
	@$(BIN)/python -m cuda_ops benchmark

lock:
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --no-emit-index-url \
		--no-annotate --no-header --group pyproject.toml:cuda --group pyproject.toml:dev \
		--group pyproject.toml:lock pyproject.toml --output-file requirements.lock

clean:
	rm -rf .build outputs
