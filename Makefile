# SPDX-License-Identifier: Apache-2.0
# make demo, make test: each does all its set-up on a machine with python3, a C++ compiler and a package index.
#   VENV=.venv                       the virtual environment, made when it is missing
#   TORCH='torch>=2.11,<2.15'        the torch to install, for example TORCH=torch==2.13.0
#   PYTHON=python3                   the interpreter the environment is made from
#   JOBS=2                           processes that run tests, each with one thread unless a test asks for more
#   EMULATION=0                      without the CUDA sources compiled for the CPU, and the tests that run them
#   ISOLATED=1                       `pip install .` as a user types it: pip makes an environment to build in
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
TORCH ?= torch>=2.11,<2.15
PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= 2
EMULATION ?= 1
ISOLATED ?= 0
BUILD_TOOLS := 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.26' 'ninja>=1.11'

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
# -v, into a log: pip shows what a build prints only then.
INSTALL = $(if $(filter 1,$(ISOLATED)),,OSORA_BUILD_DIR=$(BUILD)) $(PY) -m pip --disable-pip-version-check install -v \
  $(if $(filter 1,$(ISOLATED)),,--no-build-isolation) --force-reinstall --no-deps .
STAMPS := $(VENV)/.stamps
BUILD := $(CURDIR)/build/$(patsubst .%,%,$(notdir $(VENV)))
NATIVE := $(shell find csrc tests/emulation tests/rounding -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc cmake build_backend python -type f ! -name '*.pyc' ! -name '*.so' ! -name _compiled_for.py) \
  CMakeLists.txt setup.py pyproject.toml README.md

# What runs csrc/cuda on the CPU.
COVERAGE_TESTS := $(addprefix tests/ops/test_,fold.py fold_many.py multi_kernels.py decode.py) \
  $(addprefix tests/svd/test_,dense_cuda.py drivers.py) -k 'emulated or dense'

# Nothing of a run depends on the user's language, and nothing is fetched from a model hub.
export LC_ALL := C.UTF-8
export PYTHONDONTWRITEBYTECODE := 1
export HF_HUB_OFFLINE := 1
export HF_HOME := $(CURDIR)/build/huggingface
export MPLCONFIGDIR := $(CURDIR)/build/matplotlib
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test prepare unit lint emulation coverage rounding peft-versions deepspeed torch-versions capabilities torch packages clean
.DEFAULT_GOAL := test
ifndef VERBOSE
.SILENT:
endif

# ---- what people type -------------------------------------------------------------------------------------------

demo: $(STAMPS)/installed $(STAMPS)/demo
	$(PY) examples/finetune.py

test: lint unit

# Everything but the tests themselves.
prepare: $(STAMPS)/strict $(STAMPS)/test $(if $(filter 0,$(EMULATION)),,emulation)

# worksteal: a worker that is through takes half of what another has left; until then files and their fixtures stay whole.
unit: prepare
	echo "-- pytest"
	[ "$(EMULATION)" = 0 ] || export OSORA_EMULATION_DIR=$(BUILD)/tests/emulation OSORA_REQUIRE_EMULATION=1
	export OSORA_REQUIRE_NVCC=$$($(PY) -c 'import osora; print(int(osora.build_info()["cuda"]))')
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal $(if $(filter 0,$(EMULATION)),--ignore=tests/project/test_emulation.py) $(PYTEST_ARGS)

lint: $(STAMPS)/strict $(STAMPS)/test
	echo "-- ruff, clang-format, mypy"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(NATIVE)
	$(PY) -m mypy

emulation: $(STAMPS)/strict
	echo "-- emulation: the CUDA sources, compiled for the CPU"
	cmake -S . -B $(BUILD) -DOSORA_EMULATION=ON > build/emulation.log || { cat build/emulation.log; false; }
	cmake --build $(BUILD) > build/emulation.log || { cat build/emulation.log; false; }

# How much of csrc/cuda the tests run on the CPU: kernels by the emulator, host code with stand-ins for CUDA's libraries.
coverage: prepare
	echo "-- coverage of csrc/cuda"
	cmake --build $(BUILD) --target osora_emulated_coverage > build/coverage.log || { cat build/coverage.log; false; }
	$(PY) tests/emulation/coverage.py $(BUILD) --jobs $(JOBS) -- -q --no-header $(COVERAGE_TESTS)

# The SVD on machines that do not exist: each seed rounds otherwise (tests/rounding). SEEDS='1 2' for fewer.
SEEDS ?= $(shell seq 1 20)
ROUNDING_TESTS := $(addprefix tests/svd/test_,values.py certificates.py arguments.py plan.py hostile.py floor.py panels.py \
  spectrum.py)
# Left out: programs of their own, which round as this machine does.
ROUNDING_CASES := not (no_more_memory_is_taken or an_error_in_a_worker_thread)

rounding: prepare
	export OSORA_EMULATION_DIR=$(BUILD)/tests/emulation OSORA_REQUIRE_EMULATION=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
	for seed in $(SEEDS); do
	  echo "-- the SVD, rounded by seed $$seed"
	  OSORA_ROUNDING=$$seed $(PY) -m pytest -q --no-header -n $(JOBS) --dist worksteal $(ROUNDING_TESTS) -k "$(ROUNDING_CASES)"
	done

# Operators, SVD and panels as on a processor with fewer instructions: torch and our loops are held to each capability, MKL
# (on Intel's processors) and oneDNN to AVX2. Left out: what is the same on any processor, and what mostly waits for a
# compiler.
CAPABILITIES := default avx2
CAPABILITY_TESTS := $(addprefix tests/ops/test_,cpu_paths.py fold.py linear.py linear_add.py linear_autograd.py linear_multi.py \
  materialised.py sorsa.py) $(addprefix tests/svd/test_,panels.py values.py certificates.py hostile.py)
CAPABILITY_CASES := not (emulated or cuda or reference or compile or opcheck or saves or memory or refused or plan or worker_thread)

capabilities: $(STAMPS)/strict $(STAMPS)/test
	export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
	for capability in $(CAPABILITIES); do
	  echo "-- capability $$capability"
	  export ATEN_CPU_CAPABILITY=$$capability
	  $(PY) tests/support/processor.py
	  $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(CAPABILITY_TESTS) -k "$(CAPABILITY_CASES)"
	done

# The tests of osora.peft under the oldest PEFT that is supported and one in between; `make test` runs them under the newest.
# ALSO: other slow tests, to run beside them.
PEFT_VERSIONS := 0.18.1 0.20.0
PEFT_FOLDERS := $(PEFT_VERSIONS:%=build/peft-%)

peft-versions: $(PEFT_FOLDERS:%=%/.done)
	export OSORA_PEFT_FOLDERS=$(subst $(eval ) ,:,$(PEFT_FOLDERS:%=$(CURDIR)/%))
	$(MAKE) unit PYTEST_ARGS="-m slow tests/peft/test_peft_versions.py $(ALSO)"

build/peft-%/.done: $(STAMPS)/test
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) peft==$*
	touch $@

# DeepSpeed itself, in a folder of its own: two processes on the CPU. Nothing of it is compiled before it is used.
DEEPSPEED := build/deepspeed-0.19.8

deepspeed: $(DEEPSPEED)/.done
	PYTHONPATH=$(CURDIR)/$(DEEPSPEED) $(MAKE) unit PYTEST_ARGS="-m slow -n 0 tests/model/test_deepspeed.py"

$(DEEPSPEED)/.done: $(STAMPS)/test
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --target $(@D) deepspeed==$(@D:build/deepspeed-%=%) einops hjson msgpack py-cpuinfo
	touch $@

# What stands on torch, under another version: operators, layers, torch.compile and torch.export around them, the SVD, the
# build. Each version has an environment of its own, without CUDA. 2.11.0 is the oldest that is supported.
TORCH_VERSIONS := 2.11.0 2.13.0
TORCH_TESTS := $(patsubst %,tests/%.py,project/test_api project/test_build $(addprefix ops/test_,linear linear_add \
  linear_autograd linear_multi fold fold_many given decode materialised sorsa compiled composition) $(addprefix layers/test_,layers ablations read_weight first_step) \
  $(addprefix model/test_,sorsa_adapter execution together together_composed compiled_model adapters adapter_batch distributed) \
  $(addprefix svd/test_,values certificates arguments plan hostile floor))
other_torch = OSORA_CUDA=0 $(MAKE) $(1) VENV=.venv-torch-$* TORCH=torch==$* EMULATION=0

torch-versions: $(TORCH_VERSIONS:%=torch-version-%)

torch-version-%:
	$(call other_torch,unit) PYTEST_ARGS="$(TORCH_TESTS)"

# Its packages alone, torch and those of the tests: unpacking them takes a core some minutes.
torch-packages-%:
	$(call other_torch,packages)

clean:
	rm -rf build

# ---- set-up -----------------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("osora needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON")'
	echo "-- virtual environment in $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed: install venv and pip for this Python (Debian: python3-venv)"; false; }
	mkdir -p $(STAMPS) build
	touch $@

# Asked on every run, since TORCH may have changed; with the right torch in place pip does nothing. The stamp
# changes only when torch does. (numpy: torch warns without it.)
torch: $(STAMPS)/venv
	echo "-- $(TORCH)"
	$(PIP) '$(TORCH)' numpy
	version=$$($(PY) -c 'import torch; print(torch.__version__)')
	echo "$$version" | cmp --silent - $(STAMPS)/torch || echo "$$version" > $(STAMPS)/torch
$(STAMPS)/torch: torch ;

# With torch in the same breath: torch 2.11 wants a setuptools below 82.
$(STAMPS)/tools: $(STAMPS)/torch Makefile
	$(PIP) $(BUILD_TOOLS) '$(TORCH)'
	touch $@

# What 'osora[test]' will ask for, before osora is there. (setuptools knows a tomllib for Python 3.10 too.)
packages: $(STAMPS)/tools
	echo "-- packages for the tests"
	$(PY) -c 'from setuptools.compat.py310 import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' > $(VENV)/test-packages
	$(PIP) -r $(VENV)/test-packages '$(TORCH)'

# A plain install, as a user has it. build/lib* is removed because setuptools would pack files deleted meanwhile.
$(STAMPS)/installed: $(SOURCES) $(STAMPS)/torch $(STAMPS)/tools
	echo "-- build"
	mkdir -p build
	rm -rf build/lib.* build/bdist.*
	$(INSTALL) > build/install.log 2>&1 || { cat build/install.log; false; }
	grep -o 'osora: building.*' build/install.log
	$(PIP) osora
	touch $@

# The same with warnings as errors, and CUDA compiled for every generation wherever torch is a CUDA build.
$(STAMPS)/strict: $(SOURCES) $(STAMPS)/torch $(STAMPS)/tools .ci/ensure_nvcc.py
	echo "-- build, warnings as errors"
	mkdir -p build
	rm -rf build/lib.* build/bdist.*
	$(PY) .ci/ensure_nvcc.py
	export OSORA_WERROR=1 TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0;12.0+PTX'
	$(INSTALL) > build/install.log 2>&1 || { cat build/install.log; false; }
	grep -o 'osora: building.*' build/install.log
	$(PIP) osora
	touch $(STAMPS)/installed $@

$(STAMPS)/test: $(STAMPS)/strict pyproject.toml
	echo "-- packages for the tests"
	$(PIP) 'osora[test]'
	touch $@

$(STAMPS)/demo: $(STAMPS)/installed pyproject.toml examples/requirements-demo.txt
	echo "-- packages for the demo"
	$(PIP) 'osora[demo]'
	$(PIP) --no-deps -r examples/requirements-demo.txt
	touch $@
