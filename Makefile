# make test | bench | bench-check | figures | examples | gpu | lint | format | clean: each makes the
# environment that it needs.
#
#   make test                                 everything in .venv, versions of constraints.txt
#   make test VENV= PYTHON=/path/to/python    that interpreter as it is: no download, works offline
#   make test PYTEST_ARGS="-k sgd -x"         arguments for pytest; BENCH_ARGS for the bench
#
# CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and FUSED_MOMENTUM_CUDA reach setup.py. CUDA kernels
# are built for the GPUs of this machine; where it has none for one, to see that they can be built.

PYTHON ?= python3
VENV ?= .venv
PYTHON_PATH := $(shell $(PYTHON) -c "import sys; print(sys.executable)")
ifeq ($(PYTHON_PATH),)
$(error PYTHON=$(PYTHON) does not run)
endif

ifeq ($(VENV),)
PY := $(PYTHON_PATH)
INSTALLED := build/installed$(subst /,-,$(PY))
INSTALL := --no-deps --no-index -e .
else
PY := $(abspath $(VENV))/bin/python
INSTALLED := $(VENV)/installed
INSTALL := -c constraints.txt -e ".[triton,test,bench,examples]"
TORCH := $(VENV)/torch
LINTERS := $(VENV)/linters
endif

# --no-compile: what is imported is compiled then, and most of it never is.
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check -q install --no-compile
EXTENSION := fused_momentum/_C$(shell $(PYTHON) -c "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'))")
CONFIG := $(PY) $(shell $(PY) -c "import torch; print(torch.__version__)" 2> /dev/null) $(CXX) $(CUDA_HOME) $(TORCH_CUDA_ARCH_LIST) $(FUSED_MOMENTUM_CUDA)
CPP_FILES = find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu"

LINKED := $(shell cd / && $(PY) -c "import json; from importlib.metadata import distribution; print(json.loads(distribution('fused_momentum').read_text('direct_url.json'))['url'][7:])" 2>/dev/null)

export PATH := $(dir $(PY)):$(PATH)
ifndef TORCH_CUDA_ARCH_LIST
CAPABILITIES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | grep -x "[0-9.]*" | sort -u)
export TORCH_CUDA_ARCH_LIST := $(or $(CAPABILITIES),9.0)
endif
.PHONY: test bench bench-check figures examples gpu gpu-test gpu-bench lint format clean FORCE
.NOTPARALLEL:
# A stamp is void where the environment links to no checkout, or to another one.
ifneq ($(LINKED),$(CURDIR))
.PHONY: $(INSTALLED)
endif

# On all processors where pytest-xdist is there.
test: $(EXTENSION)
	$(PY) -m pytest $$($(PY) -c "import xdist; print('-n auto')" 2> /dev/null) $(PYTEST_ARGS)

bench: $(EXTENSION)
	$(PY) -m bench.run $(BENCH_ARGS)

# Counts the instructions of a step under valgrind, and compares with those committed.
bench-check: $(EXTENSION)
	$(PY) -m bench.instructions $(BENCH_ARGS)

# From the CSV files in bench/results, whatever machine they are from: the figures, the summary
# beside them and the table of README.md.
figures: $(EXTENSION)
	$(PY) -m bench.figures
	$(PY) -m bench.summary

examples: $(EXTENSION)
	for example in examples/*.py; do $(PY) $$example || exit 1; done

GPU_FIRST := tests/test_step_errors.py
GPU_SMALL := tests/test_gpu_small.py
GPU_TESTS := tests/test_gpu.py tests/test_gpu_sgd_sai.py tests/test_gpu_autosgm.py $(GPU_SMALL)
GPU_TOO := tests/test_parity.py tests/test_rules.py tests/test_sgd_sai.py tests/test_sgd_sai_bugs.py
GPU_TOO += tests/test_plan_sequences.py

# On a GPU machine, offline, with its own Python and torch: builds, tests, benches; commit what it
# leaves in bench/results. DRY=1 stops where a GPU would be needed. Its halves are targets too:
# gpu-test takes three minutes at most for each tool of compute-sanitizer, gpu-bench GPU_SECONDS.
GPU_SECONDS ?= 420
# Without torch's cache every tensor is an allocation of its own, past whose end memcheck sees.
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 180 compute-sanitizer --error-exitcode 1 --tool
ifdef DRY
gpu:
	$(MAKE) VENV=$(VENV) $(EXTENSION)
	$(PY) -c "import fused_momentum as fm; print(*fm.backends(), sep='\n')"
	$(PY) -m pytest --collect-only -q -m gpu $(GPU_TESTS)
	$(PY) -m bench.run --help > /dev/null
	@echo "on a GPU: $(GPU_FIRST), $(GPU_TESTS) $(GPU_TOO)"
	@echo "then $(GPU_SMALL) under compute-sanitizer's memcheck and racecheck"
	@echo "then bench.run --device cuda --seconds $(GPU_SECONDS), bench.summary"
else
gpu: gpu-test gpu-bench

# Errors first: where the compiler's C++ library is not torch's, every one ends the process.
gpu-test:
	FUSED_MOMENTUM_CUDA=1 $(MAKE) VENV= $(EXTENSION)
	$(PYTHON_PATH) -m pytest -x -k "cuda or triton" $(GPU_FIRST)
	$(PYTHON_PATH) -m pytest $(GPU_TESTS)
	$(PYTHON_PATH) -m pytest -k "cuda or triton" $(GPU_TOO)
	$(SANITIZE) memcheck $(PYTHON_PATH) -m pytest -q -x $(GPU_SMALL)
	$(SANITIZE) racecheck $(PYTHON_PATH) -m pytest -q -x $(GPU_SMALL)

gpu-bench:
	FUSED_MOMENTUM_CUDA=1 $(MAKE) VENV= $(EXTENSION)
	$(PYTHON_PATH) -m bench.run --device cuda --seconds $(GPU_SECONDS)
	$(PYTHON_PATH) -m bench.summary
endif

lint: $(LINTERS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CPP_FILES) | xargs -r clang-format --dry-run -Werror

format: $(LINTERS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CPP_FILES) | xargs -r clang-format -i

clean:
	rm -rf build dist *.egg-info fused_momentum/_C*.so $(VENV)

$(VENV)/bin/python:
	$(PYTHON_PATH) -m venv $(VENV)

# torch comes first and alone, by exactly this version: a local CPU build of it is then taken.
$(VENV)/torch: constraints.txt | $(VENV)/bin/python
	@echo "installing torch into $(VENV): this takes minutes"
	$(PIP_INSTALL) -c constraints.txt $(shell grep ^torch== constraints.txt) ninja setuptools wheel
	touch $@

$(VENV)/linters: constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -c constraints.txt clang-format ruff
	touch $@

# The package is linked once, the extension built beside it whenever something below csrc changed.
$(INSTALLED): pyproject.toml $(TORCH)
	FUSED_MOMENTUM_NO_EXTENSION=1 $(PIP_INSTALL) --no-build-isolation $(INSTALL)
	mkdir -p $(@D) && touch $@

$(EXTENSION): $(INSTALLED) build/config setup.py $(shell find csrc)
	FUSED_MOMENTUM_REQUIRE_EXTENSION=1 $(PY) setup.py -q build_ext --inplace
	touch $@

# Rewritten only where it differs: another interpreter or compiler builds the extension anew.
build/config: FORCE
	@mkdir -p build
	@echo "$(CONFIG)" | cmp -s - $@ || echo "$(CONFIG)" > $@
