# From nothing: `make report`, `make test`. Each target makes .venv first if it is missing.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: report test lab record lint

report: $(VENV)/ready
	$(BIN)/lowrank run

test: $(VENV)/ready
	$(BIN)/pytest

lab: $(VENV)/ready
	$(BIN)/jupyter lab --notebook-dir=notebooks

record: $(VENV)/ready
	$(BIN)/lowrank record

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
