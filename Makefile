# `make demo` and `make test` work on a fresh clone: they build .venv first, from pinned versions.
PYTHON ?= python3
JOBS ?= 2
MINUTES ?= 25
BIN := .venv/bin
# For Triton's interpreter; installed only where torch brings no Triton itself, as CPU builds do not.
TRITON := triton==3.9.0
BUILD := build==1.6.1

.PHONY: help venv native demo test lint format docs wheels sanitize test-gpu bench-gpu gpu-proof clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

venv: .venv/.installed ## build the virtual environment .venv from requirements.txt

.venv/.installed: pyproject.toml requirements.txt setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "depthfuse needs Python 3.11 or later; $(PYTHON) is older or missing. Try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

depthfuse/native/built/.done: .venv/.installed $(wildcard csrc/cpu/*)
	$(BIN)/python -m depthfuse.native
	mkdir -p $(@D) && touch $@

native: depthfuse/native/built/.done ## build the native CPU engine, where there is a g++

demo: venv native ## prune, merge and accelerate a CNN and a ViT on the embedded images, into runs/demo
	$(BIN)/depthfuse demo --out runs/demo

test: venv native ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: venv ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

docs: .venv/.docs ## build the documentation into docs/_build, with warnings as errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "built: docs/_build/index.html"

# Each is built in an environment of its own, where there is no torch that it would be pinned to.
wheels: venv ## build dist/*.whl: one for any machine, one with the CPU engine for machines like this one
	$(BIN)/python -m pip install --quiet $(BUILD)
	$(BIN)/python -m build --wheel
	DEPTHFUSE_BUILD_NATIVE=1 $(BIN)/python -m build --wheel

sanitize: venv ## run the engine's tests under the address, undefined-behaviour and thread sanitizers (some minutes)
	$(BIN)/python tests/native/sanitize.py

# A GPU machine has its own torch and Triton: these two use that Python, not .venv.
test-gpu: ## run the tests that need a GPU, in the environment of $(PYTHON)
	$(PYTHON) -m pytest tests -m gpu

gpu-proof: ## all that this GPU can prove, in MINUTES minutes (25); goes on where it was stopped
	$(PYTHON) -m benchmarks.gpu_proof --minutes $(MINUTES)

bench-gpu: ## time operators and whole models on the GPU, in the environment of $(PYTHON)
	$(PYTHON) -m benchmarks.kernels.micro --device cuda --dtypes fp16 --batches 1 128; operators=$$?; \
	$(PYTHON) -m benchmarks.models --device cuda --dtype fp16 --batch 1 128 && exit $$operators

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv depthfuse/native/built build dist docs/_build depthfuse.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
