# `make demo` and `make test` are all that a newcomer needs; each sets up its own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(abspath $(BIN))
# Any torch from 2.10 on. Set TORCH= for another build, or TORCH="" to keep what is installed.
TORCH  ?= torch==2.13.0
# Two threads: the tests ask for one and two, and torch processes beside each other slow one another down.
JOBS   ?= 2

.PHONY: help demo test test-fast lint bench docs test-gpu bench-gpu test-triton test-aot test-old-cpu test-amx check-aarch64 test-sanitize format clean

help:
	@echo "make demo           train a flow on real digits, compare it with baselines, draw the pictures"
	@echo "make test           lint, types and every test that needs no GPU"
	@echo "make bench          measure the ops against eager and compiled PyTorch"
	@echo "make test-gpu       the op tests on a CUDA device;  make bench-gpu  the benchmarks there"
	@echo "make test-old-cpu   every op under an emulated CPU without AVX (needs qemu-user)"
	@echo "make check-aarch64  cross-compile the CPU kernels for AArch64 (needs g++-aarch64-linux-gnu)"
	@echo "make test-sanitize  the op tests with address and undefined-behaviour sanitizers"

# ---- environment ---------------------------------------------------------------------------------------------------
# The stamp depends on what is compiled and on what is installed; Python files are used in place.
SOURCES := $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/* csrc/shared/*) setup.py pyproject.toml

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("pygen needs Python 3.10 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel pybind11 ninja numpy $(TORCH)

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[cli,train,ssa,dev]"
	@touch $@

# ---- the two commands ----------------------------------------------------------------------------------------------
demo: $(VENV)/installed
	$(BIN)/pygen demo --out demo

test: lint test-fast test-triton test-aot

# ---- parts of them -------------------------------------------------------------------------------------------------
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" --ignore tests/triton_kernels --ignore tests/ssa/test_cuda.py

# The same op tests on the Triton kernels, run by Triton's interpreter on the CPU.
test-triton: $(VENV)/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" tests/ops tests/triton_kernels --ignore tests/triton_kernels/test_aot.py

# Every Triton kernel compiled ahead of time for four chips: no spills, shared memory within the chip's. The CUDA kernel
# by nvcc for three, where there is one.
test-aot: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) tests/triton_kernels/test_aot.py tests/ssa/test_cuda.py

bench: $(VENV)/installed
	$(BIN)/pygen bench --peers --json bench.json --plot bench.png

docs: $(VENV)/installed
	$(BIN)/python -m pytest --doctest-modules pygen/ops pygen/backends.py pygen/models pygen/nn pygen/functional pygen/data pygen/ssa

# ---- where a GPU is at hand ----------------------------------------------------------------------------------------
test-gpu:
	$(PYTHON) -m pytest -k cuda tests/ops && $(PYTHON) -m pytest tests/triton_kernels --ignore tests/triton_kernels/test_aot.py && $(PYTHON) -m pytest -m gpu tests/ssa

bench-gpu:
	$(PYTHON) -m pygen.benchmarks --peers --device cuda --json benchmarks/results/gpu.json --plot benchmarks/results/gpu.png
	$(PYTHON) -m pygen.benchmarks.memory --device cuda --json benchmarks/results/gpu-memory.json --plot benchmarks/results/gpu-memory.png

# ---- run now and then ----------------------------------------------------------------------------------------------
# Nehalem is a 64-bit CPU of 2008: SSE4.2, no AVX.
test-old-cpu: $(VENV)/installed
	qemu-x86_64 -cpu Nehalem $(RUN)/python tests/old_cpu.py

# On a CPU with AMX the tests run that level anyway, and nothing is emulated.
test-amx: $(VENV)/installed
	$(BIN)/python -c 'import sys; from pathlib import Path; sys.path.insert(0, "tests"); import amx; amx.emulator(Path("build"))'
	OMP_NUM_THREADS=1 LD_PRELOAD=$(abspath build)/libamx_emulator.so $(BIN)/pytest -q -m "not slow" -k "cpu-amx" tests/ops/test_nearest_codebook.py

# The search in the integer and tile instructions of x86-64: ONLY_LEVEL in setup.py.
ONLY_X86 = csrc/cpu/nearest_codebook_integers.cpp csrc/cpu/nearest_codebook_bf16.cpp
check-aarch64:
	@for f in $(filter-out $(ONLY_X86),$(wildcard csrc/cpu/*.cpp)); do \
	  echo "aarch64-linux-gnu-g++ $$f"; \
	  aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -Wall -Wextra -Werror -Wno-psabi -c $$f -o /dev/null || exit 1; done

# Python itself is not sanitized, so the runtimes come in by LD_PRELOAD, and the interpreter's leaks are its own.
SANITIZERS = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so) $(shell g++ -print-file-name=libstdc++.so)
test-sanitize: $(VENV)/installed
	PYGEN_SANITIZE=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitized .
	OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(SANITIZERS)" PYTHONPATH=build/sanitized \
	  $(BIN)/pytest -q -m "not slow" -k "not compiles and not exports and not opcheck" tests/ops

format: $(VENV)/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

clean:
	rm -rf build dist *.egg-info pygen/_C*.so .pytest_cache .mypy_cache .ruff_cache
