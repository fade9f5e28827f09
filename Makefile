# Every target sets itself up in .venv: Python 3.10 or newer, a C++ compiler and make are enough.
#   make demo      reference and drop-in side by side on real images, then speed (under 10 minutes on 2 cores)
#   make test      lint, then the CI tier of the tests (under 25 minutes on 2 cores)
#   make test-all  lint, then every test
#   make lint      ruff, mypy, clang-format; make format lets ruff and clang-format rewrite
#   make bench     python -m benchmarks, with the options in ARGS, for example ARGS=--help
#   make clean     removes .venv and everything built
#   make help      these lines
# PYTHON is the interpreter of a new .venv. TORCH is what pip is asked for: 2.13.0 where there is no NVIDIA driver, else
# any from 2.11. On PyPI's Linux x86-64 that wheel carries CUDA libraries even for a CPU; to have the small CPU build,
# let pip use PyTorch's CPU index (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or pip.conf) or say TORCH=path/to/torch.whl.
# JOBS is the number of test processes.
PYTHON ?= python3
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)
JOBS ?= 2
ARGS ?=
PYTEST_ARGS ?=

MAKEFLAGS += --no-print-directory
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := $(PY) -m pytest -n $(JOBS) --dist worksteal --benchmark-disable $(PYTEST_ARGS)
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
# Recompiles what changed since the install, and says again why an extension cannot be built.
BUILD := $(PY) setup.py --quiet build_ext --inplace

.PHONY: help demo test test-all lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/demo.stamp
	@$(BUILD)
	$(PY) -m wrn_fast.demo $(ARGS)

test: lint
	$(PYTEST) -m "not long and not gpu"

test-all: lint
	$(PYTEST) --all-cases

lint: $(VENV)/dev.stamp
	@$(BUILD)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

bench: $(VENV)/bench.stamp
	@$(BUILD)
	$(PY) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist wrn_fast.egg-info wrn_fast/_build_reasons.txt wrn_fast/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu split ensurepip off: then virtualenv, if it is there, does the same work.
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m virtualenv --clear $(VENV) || \
	    { echo 'No venv: install python3-venv (Debian, Ubuntu) or virtualenv, or name another interpreter in PYTHON'; exit 1; }
	@touch $@

# torch first, alone: what follows then keeps it. setuptools, pybind11 and ninja build the extension in place.
$(VENV)/torch.stamp: $(VENV)/pip.stamp
	$(PIP) "$(TORCH)" setuptools pybind11 ninja
	@touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/demo.stamp: EXTRAS := demo
$(VENV)/dev.stamp: EXTRAS := dev,test
$(VENV)/bench.stamp: EXTRAS := bench
