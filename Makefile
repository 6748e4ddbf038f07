# From nothing: `make report`, `make test`. Each target makes .venv first if it is missing.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # or each command, worker and kernel compiles PyTorch's modules again

.PHONY: help report test test-fast test-notebooks test-commands check evidence test-machines bench lab record lint docs

help:
	@echo "make report         run all notebooks into reports/latest/: pages, index.html, results.json"
	@echo "make test           run all tests: unit tests, runs, sweeps, the browser, the shortest recorded notebooks"
	@echo "make test-fast      run the unit tests alone, in a minute"
	@echo "make check          execute the recorded notebooks again; compare their words, and claims with the evidence"
	@echo "make test-machines  the same from other seeds, in other arithmetic, with other numbers of threads; takes an hour"
	@echo "make bench          run the benchmarks; print their tables and save them in reports/latest/; takes long"
	@echo "make lab            open JupyterLab in notebooks/"
	@echo "make record         run all notebooks with their defaults; write outputs into notebooks/ and reports/reference/"
	@echo "make evidence       run all notebooks from 20 seeds; write what they measure into evidence/; takes hours"
	@echo "make lint           run ruff and mypy"
	@echo "make docs           write the package's pages from its docstrings into docs/api/"
	@echo
	@echo "Data: LOWRANK_DATA_DIR=folder make …   Another Python: make PYTHON=python3.12 …"

report: $(VENV)/ready
	$(BIN)/lowrank run

# Three parts, two at a time: unit tests; what starts commands; and what executes notebooks of the series.
NOTEBOOKS := tests/series/test_checking.py tests/series/test_exercises.py

test: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs=2 --output-sync=line test-fast test-commands test-notebooks

test-notebooks: $(VENV)/ready
	$(BIN)/pytest -m slow $(NOTEBOOKS)

test-commands: $(VENV)/ready
	$(BIN)/pytest -m slow $(NOTEBOOKS:%=--ignore=%)

test-fast: $(VENV)/ready
	$(BIN)/pytest -m "not slow"

check: $(VENV)/ready
	$(BIN)/lowrank check

# Each takes minutes, from a seed that the evidence has not seen: another machine is another seed. `make -i` goes on after a failure.
test-machines: $(VENV)/ready
	$(BIN)/lowrank check -p seed 101
	$(BIN)/lowrank check -p seed 102 -p precision float32
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 $(BIN)/lowrank check -p seed 103  # without AMX
	ONEDNN_MAX_CPU_ISA=AVX512_CORE $(BIN)/lowrank check -p seed 104  # without bfloat16
	OMP_NUM_THREADS=1 $(BIN)/lowrank check -p seed 105
	OMP_NUM_THREADS=4 $(BIN)/lowrank check -p seed 106

bench: $(VENV)/ready
	mkdir -p reports/latest
	$(BIN)/pytest tests/benchmarks -o 'python_files=bench_*.py' \
		--benchmark-quiet --benchmark-json=reports/latest/benchmarks.json

lab: $(VENV)/ready
	$(BIN)/jupyter lab --notebook-dir=notebooks

record: $(VENV)/ready
	$(BIN)/lowrank run
	$(BIN)/python scripts/record.py

evidence: $(VENV)/ready
	$(BIN)/python scripts/evidence.py
	$(BIN)/python scripts/evidence.py -p dataset digits

docs: $(VENV)/ready
	$(BIN)/pdoc --docformat numpy --output-directory docs/api lowrank_helpers

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A second make in the same folder waits for the first, and then finds the environment made.
$(VENV)/ready: pyproject.toml constraints.txt
	@mkdir -p $(VENV)
	@$(shell command -v flock >/dev/null && echo flock $(VENV)/lock) $(MAKE) --no-print-directory $(VENV)/installed
	@touch $@

# uv installs several times as fast as pip, which stands in where uv is missing or fails.
$(VENV)/installed: INSTALL := install --quiet -c constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Making $(VENV) from constraints.txt: PyTorch is large, so this takes a minute or more the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) --disable-pip-version-check uv && \
		$(BIN)/uv pip $(INSTALL) --python $(BIN)/python -e '.[series,test]' || \
		$(BIN)/pip $(INSTALL) --disable-pip-version-check -e '.[series,test]'
	@touch $@
