# make train      installs what is needed, compiles, and meta-trains a few-shot learner on a built-in data set
# make test       installs what is needed, compiles, and runs the everyday tests and the checks
# make test-all   runs the rest, which takes longer: the Python tests marked `long`, the C++ tests, the CUDA kernels run
#                 by the CPU under all Python tests of their ops, and the C++ tests again under sanitizers
# make docs       installs what is needed, compiles, and makes the documentation site in build/docs/html
# make wheel      builds the sdist and a wheel into dist/, for this Python and torch, and for the CPU alone unless
#                 IMAML_EXT_CUDA is set; `make test-wheel` installs it into a clean environment and uses it there
#
# All of them use the active virtual or conda environment, else they make .venv. Variables:
#   TORCH=torch==2.13.0   the torch to have (default: whichever is installed, else the index's newest)
#   TRAIN=glyphs-5w1s     the preset that `make train` trains; ARGS="--run.seed 1" goes to `imaml train`
#   PYTHON=python3        the Python (3.10 or later) that makes the environment; VENV=.venv, where
#   SANITIZE=address,undefined   the sanitizers; empty: none
#   IMAML_EXT_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS   as for `pip install`
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TORCH ?= torch
TRAIN ?= glyphs-5w1s
ARGS ?=
PYTHON ?= python3
SANITIZE ?= address,undefined
VENV ?= $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(BIN):$(PATH)

# A record of what was set up, so that a second call repeats nothing.
STATE := build/setup
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml imaml_ext/_build.py imaml_ext/_record.py imaml_ext/_version.py $(shell find csrc -type f)
CPP_FILES := $(shell find csrc cpp_tests examples -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install train test test-all test-python test-long test-kernels test-cpp test-sanitize wheel test-wheel \
        lint format docs docs-links clean FORCE
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STATE)/for-use

# --resume: a run that was interrupted goes on, and one that is not there yet begins.
train: $(STATE)/for-use
	$(BIN)/imaml train $(TRAIN) --resume $(ARGS)

test: test-python test-kernels lint
test-all: test-long test-cpp test-sanitize

# --- setting up ---------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}; 3.10 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# Changes, and has all that follows done again, only when the environment, its Python or its torch is another one.
$(STATE)/torch: $(BIN)/python FORCE
	@mkdir -p $(STATE)
	@if [ "$(TORCH)" != torch ] || ! $(BIN)/python -c 'import torch' 2> /dev/null; then $(PIP) install "$(TORCH)" numpy; fi
	@$(BIN)/python -c 'import sys, torch; print(sys.prefix, sys.version.split()[0], torch.__version__)' > $@.now
	@if cmp -s $@.now $@; then rm $@.now; else mv $@.now $@; fi

$(STATE)/for-use: EXTRAS =
$(STATE)/for-test: EXTRAS = [dev,tensorboard]
$(STATE)/for-docs: EXTRAS = [docs]
$(STATE)/for-use $(STATE)/for-test $(STATE)/for-docs: $(STATE)/torch $(BUILD_INPUTS)
	@echo 'Compiling and installing imaml-ext$(EXTRAS); the log is $(STATE)/install.log'
	@# The torch that is there stays: no dependency may exchange it for another.
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STATE)/constraints
	@{ $(PIP) install 'setuptools>=77' 'cmake>=3.25' ninja && \
	   $(PIP) install -v --no-build-isolation -c $(STATE)/constraints -e '.$(EXTRAS)'; } > $(STATE)/install.log 2>&1 || \
	 { tail -n 60 $(STATE)/install.log; exit 1; }
	@grep -ho 'imaml-ext: building .*' $(STATE)/install.log | sort -u
	@touch $@ $(STATE)/for-use

# The libraries of the extra `integrations`, by uv: betty-ml names torch>=1.6.*, which pip refuses, and pydvl numpy<2, with
# which it need not be. The torch that is there stays.
$(STATE)/for-integrations: $(STATE)/for-test
	@echo 'Installing the libraries of imaml_ext.integrations; the log is $(STATE)/integrations.log'
	@echo numpy > $(STATE)/overrides
	@{ $(PIP) install uv && \
	   $(BIN)/python -c 'from importlib.metadata import requires; print(*(r for r in requires("imaml-ext") if "extra == \"integrations\"" in r), sep="\n")' \
	     | cut -d ';' -f 1 > $(STATE)/integrations && \
	   $(BIN)/uv pip install --python $(BIN)/python -c $(STATE)/constraints --override $(STATE)/overrides \
	     -r $(STATE)/integrations; } > $(STATE)/integrations.log 2>&1 || { tail -n 60 $(STATE)/integrations.log; exit 1; }
	@touch $@

# --- wheels -------------------------------------------------------------------------------------------------------------

# The wheel is built from the sdist, in a folder of its own: nothing that lies about here can get into it.
wheel: $(STATE)/torch
	@echo 'Building dist/*.whl; the log is $(STATE)/wheel.log'
	@rm -rf dist
	@{ $(PIP) install build 'setuptools>=77' 'cmake>=3.25' ninja && \
	   IMAML_EXT_LOCAL_VERSION=1 IMAML_EXT_CUDA=$${IMAML_EXT_CUDA:-0} \
	   $(BIN)/python -m build --no-isolation --outdir dist .; } \
	 > $(STATE)/wheel.log 2>&1 || { tail -n 60 $(STATE)/wheel.log; exit 1; }
	@ls -1 dist/*

test-wheel: wheel $(STATE)/for-test
	IMAML_EXT_WHEEL="$$(echo dist/*.whl)" $(BIN)/python -m pytest python_tests/test_wheel.py

# --- checks -------------------------------------------------------------------------------------------------------------

# Two at a time, a thread each: most tests wait for processes that they start, or are too small for two threads.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 12

test-python: $(STATE)/for-test
	$(PYTEST) -m 'not long'

test-long: $(STATE)/for-integrations
	IMAML_INTEGRATIONS=1 $(PYTEST) -m long

# The CUDA kernels, run by the CPU: the everyday part of their tests.
test-kernels: $(STATE)/for-test
ifeq ($(shell uname -s),Linux)
	cmake --build build/cmake --target everyday
	ctest --test-dir build/cmake --output-on-failure --parallel 2 --label-regex everyday
endif

# The C++ tests, from the objects of the extension that was installed; and the CUDA kernels, run by the CPU, under the
# Python tests of their ops.
test-cpp: $(STATE)/for-test
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure --parallel 2 --label-exclude everyday

# The C++ tests alone: the CUDA kernels' threads have stacks of their own, which the sanitizers would have to know of.
test-sanitize: $(STATE)/for-test
ifneq ($(SANITIZE),)
	cmake -S . -B build/cmake-sanitize -G Ninja -DPython3_EXECUTABLE=$(BIN)/python -DIMAML_EXT_CUDA=0 \
	  -DIMAML_EXT_SANITIZE=$(SANITIZE)
	cmake --build build/cmake-sanitize
	ctest --test-dir build/cmake-sanitize --output-on-failure --parallel 2
endif

lint: $(STATE)/for-test
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy

format: $(STATE)/for-test
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

# --- documentation ------------------------------------------------------------------------------------------------------

# A warning is an error, such as a link or a name that leads nowhere. Needs no network.
SPHINX = OMP_NUM_THREADS=1 $(BIN)/sphinx-build --fail-on-warning --quiet --fresh-env -c docs -d build/docs/pages . build/docs

docs: $(STATE)/for-docs
	$(SPHINX)/html
	$(BIN)/python docs/check_site.py build/docs/html

# The links to other sites, which take a network and other people's servers.
docs-links: $(STATE)/for-docs
	$(SPHINX)/links -b linkcheck

clean:
	rm -rf build dist imaml_ext.egg-info imaml_ext/_C*.so imaml_ext/_build_info.json
