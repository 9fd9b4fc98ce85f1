# Everything runs in .venv, made from pinned versions. `make demo` and `make test` are the two commands.
PYTHON ?= python3
BIN := .venv/bin
# tests run side by side, one thread each: a process for each core, up to 8
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal
.DEFAULT_GOAL := help

.PHONY: help demo smollm2 test check isa docs engines clean

help:  ## this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvfold needs Python 3.11 or newer; set PYTHON=python3.x"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.ready  ## fold the shipped checkpoint: GQA and MQA, uptrained, measured, reported (5 minutes)
	$(BIN)/kvfold demo

smollm2: .venv/.ready  ## fold SmolLM2-135M: download it (93 MB), convert, measure, report; nothing is trained
	$(BIN)/kvfold fetch smollm2
	$(BIN)/kvfold run recipes/smollm2.yaml

check: .venv/.ready  ## quick: format, lint, strict types, import rows, fast tests, docs in step
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow' $(SIDE_BY_SIDE)

test: .venv/.ready  ## everything that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(SIDE_BY_SIDE)

# The tests that compare numbers, as a processor without AVX-512 computes them, and with two threads.
NUMERIC := tests/attention tests/hf/test_hf.py tests/train/test_uptrain.py tests/methods/test_battery.py tests/methods/test_crosslatent.py
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 CT2_FORCE_CPU_ISA=AVX2

isa: .venv/.ready  ## numeric tests under the instruction sets of other processors, and with two threads
	$(AVX2) $(BIN)/pytest -m 'not slow' $(SIDE_BY_SIDE) $(NUMERIC)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest -m 'not slow' $(SIDE_BY_SIDE) tests/attention tests/train/test_uptrain.py
	OMP_NUM_THREADS=2 $(BIN)/pytest -m 'not slow' tests/attention tests/hf/test_hf.py

.venv/.docs: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: .venv/.docs  ## build the documentation site into build/site; a dead link or a page outside the navigation fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

engines: .venv/.ready  ## build llama.cpp (7 minutes), install vLLM for CPUs (2 GB), load students in both and CTranslate2, record
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf]'
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/serving.py

clean:  ## remove what the commands above made
	rm -rf .venv build dist .mypy_cache .ruff_cache
