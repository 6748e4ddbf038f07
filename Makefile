# From nothing: `make report`, `make test`. Each target makes .venv first if it is missing.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: help report test bench lab record lint screenshots

help:
	@echo "make report   run all notebooks into reports/latest/, with pages, index.html and results.json"
	@echo "make test     run the tests; with MNIST at hand, re-execute and check the recorded notebooks too"
	@echo "make bench    run the benchmarks, which takes long; print the tables and save them in reports/latest/"
	@echo "make lab      open JupyterLab in notebooks/"
	@echo "make record   run all notebooks with their defaults; write outputs into notebooks/ and reports/reference/"
	@echo "make lint     ruff and mypy"
	@echo "make screenshots   photograph the recorded report into docs/; needs Chromium"
	@echo
	@echo "Data: LOWRANK_DATA_DIR=folder make …   Another Python: make PYTHON=python3.12 …"

report: $(VENV)/ready
	$(BIN)/lowrank run

test: $(VENV)/ready
	$(BIN)/pytest

bench: $(VENV)/ready
	mkdir -p reports/latest
	$(BIN)/pytest tests/benchmarks -o 'python_files=bench_*.py' \
		--benchmark-quiet --benchmark-json=reports/latest/benchmarks.json

lab: $(VENV)/ready
	$(BIN)/jupyter lab --notebook-dir=notebooks

record: $(VENV)/ready
	$(BIN)/lowrank record

screenshots: $(VENV)/ready
	$(BIN)/python tests/screenshots.py

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "Making $(VENV) from constraints.txt: PyTorch is large, so this takes some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
