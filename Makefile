# Two commands for a user: `make demo` and `make test`. The rest is for people who change fastdiff.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= digits.png
TEST_PROCESSES ?= 2

# The repository root holds a folder called kernels; it must not be importable under that name.
export PYTHONSAFEPATH := 1

SOURCES := pyproject.toml setup.py MANIFEST.in constraints.txt \
	$(shell find csrc kernels fastdiff -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' \
	-o -name '*.cu' -o -name '*.cuh' -o -name '*.safetensors' -o -name 'py.typed' \))

.PHONY: demo test test-all report install-dev develop lint format aot kernel-report check-native valgrind bench evaluate wheel-check \
	gpu gpu-build gpu-test gpu-bench gpu-bench-ops gpu-bench-e2e gpu-sanitize \
	gpu-wheels clean help

help:
	@echo "make demo          venv, install, draw $(OUT)"
	@echo "make test          venv, install, the tests that need no GPU"
	@echo "make test-all      those that repeat others with more models and sizes, too"
	@echo "make lint          ruff and mypy"
	@echo "make aot           compile every Triton configuration for sm_80/89/90/100, refuse spills"
	@echo "make kernel-report write docs/kernels.md from the same compilation"
	@echo "make check-native  compile csrc/cuda with nvcc for every target, refuse spills; check ISA objects"
	@echo "make valgrind      the CPU kernels under valgrind"
	@echo "make report        README's figures and the charts from benchmarks/results"
	@echo "make bench         CPU benchmarks, into benchmarks/results/"
	@echo "make evaluate      quality of the embedded digits model on 1,000 samples"
	@echo "make gpu           on a machine with a GPU: build with CUDA, GPU tests, benchmarks"
	@echo "make gpu-sanitize  every CUDA kernel under compute-sanitizer"
	@echo "make develop       editable install instead of a copy"

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2], "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.core: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt .
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt ".[dev]"
	@touch $(VENV)/.core $@

demo: $(VENV)/.core
	$(BIN)/fastdiff sample --out $(OUT)

install-dev: $(VENV)/.dev

develop: $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.core $(VENV)/.dev

# One thread each: the tests that are about threads set their number themselves.
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal
test: $(VENV)/.dev
	$(TESTS) -m "not gpu and not long" $(PYTEST_ARGS)

# What repeats other tests with more models, sizes and dtypes, too.
test-all: $(VENV)/.dev
	$(TESTS) -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(VENV)/.dev
	$(BIN)/python -m fastdiff.aot $(AOT)

kernel-report: $(VENV)/.dev
	$(BIN)/python -m fastdiff.kernel_report

check-native: $(VENV)/.dev
	$(BIN)/python csrc/check.py

# Every CPU kernel on small shapes; also among the tests, where valgrind is installed.
valgrind: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/csrc/test_valgrind.py

report: $(VENV)/.dev
	env -u PYTHONSAFEPATH $(BIN)/python -m benchmarks.report --write

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

evaluate: $(VENV)/.dev
	$(BIN)/fastdiff evaluate

# --- GPU ---------------------------------------------------------------------------------------
# Uses the packages of $(GPU_PYTHON) as they are and needs no network: fastdiff is built into a
# folder of its own. Every piece writes its results as it goes and ends by itself within nine
# minutes: what no longer fits is left out, and said. Run again, the benchmarks go on where they
# stopped.
GPU_PYTHON ?= python3
GPU_SITE := build/gpu-site
GPU_RUN := env PYTHONPATH=$(abspath $(GPU_SITE))$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	PYTHONUNBUFFERED=1 $(GPU_PYTHON)
GPU_PIECE := timeout --kill-after=10 540
GPU_BUDGET ?= 480
# Most of the tests' time is Triton's compiler, on the processor.
GPU_PROCESSES ?= 8
GPU_XDIST = $(shell $(GPU_PYTHON) -c 'import importlib.util as u; \
	print("-n $(GPU_PROCESSES)" if u.find_spec("xdist") else "")')
GPU_BENCH := --benchmark-only -q -p no:cacheprovider --resume --budget $(GPU_BUDGET)

gpu: gpu-build gpu-test gpu-bench-ops gpu-bench-e2e

# Nothing is built again while the sources are older than the build.
gpu-build: $(GPU_SITE)/.built

$(GPU_SITE)/.built: $(SOURCES)
	rm -rf $(GPU_SITE)
	FASTDIFF_EXT=cuda $(GPU_PIECE) $(GPU_PYTHON) -m pip install -q --no-index --no-deps \
		--no-build-isolation --target $(GPU_SITE) .
	$(GPU_RUN) -m fastdiff doctor
	@touch $@

gpu-test: gpu-build
	$(GPU_PIECE) $(GPU_RUN) -m pytest tests -m gpu -v -p no:cacheprovider $(GPU_XDIST) \
		$(PYTEST_ARGS)

gpu-bench: gpu-bench-ops gpu-bench-e2e

gpu-bench-ops: gpu-build
	$(GPU_PIECE) $(GPU_RUN) -m pytest benchmarks/solvers benchmarks/ops -m gpu $(GPU_BENCH) \
		$(PYTEST_ARGS)

gpu-bench-e2e: gpu-build
	$(GPU_PIECE) $(GPU_RUN) -m pytest benchmarks/e2e -m gpu $(GPU_BENCH) $(PYTEST_ARGS)

# For a GPU machine without a network whose Python has PyTorch and Triton and little else: wheels
# that benchmarks/gpu_session.sh puts beside its packages. Run where pip works.
GPU_WHEELS ?= .whl
GPU_LACKS ?= pytest pytest-benchmark pytest-xdist pluggy iniconfig py-cpuinfo execnet diffusers \
	importlib_metadata zipp pygments packaging setuptools pybind11 ninja nvidia-ml-py
GPU_PLATFORMS := $(foreach n,5 12 17 24 27 28 34 35,--platform manylinux_2_$(n)_x86_64) \
	--platform manylinux2014_x86_64 --platform manylinux1_x86_64

gpu-wheels:
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(GPU_PLATFORMS) -c constraints.txt -d $(GPU_WHEELS) $(GPU_LACKS)

gpu-sanitize: gpu-build
	$(GPU_PIECE) $(GPU_RUN) csrc/sanitize.py

clean:
	rm -rf build dist *.egg-info fastdiff/*.so fastdiff/_build_info.json
