# make demo and make test work on a fresh clone: they create .venv, install the locked packages into it, and re-use
# it until pyproject.toml or a lock changes. LOCK= (empty) installs the newest packages that pyproject.toml allows.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq
RUN = scripts/with-openblas
KERNEL_TESTS = tests/test_parity.py tests/torch_twin tests/training/test_training_parity.py tests/training/test_loss.py \
	tests/convert/test_convert_parity.py
LOCK ?= lock
TORCH ?= -r lock/torch.txt

# The locks are complete and hold what builds packages, too: with them nothing else is looked for.
ifneq ($(LOCK),)
  LOCKED = $(PIP) install --no-deps --no-build-isolation
  INSTALL = $(LOCKED) --require-hashes -r $(LOCK)/runtime.txt && $(LOCKED) -e .
  INSTALL_DEV = $(LOCKED) --require-hashes -r $(LOCK)/dev.txt && $(PIP) install $(TORCH)
else
  INSTALL = $(PIP) install -e .
  INSTALL_DEV = $(PIP) install $(TORCH) -e '.[dev]'
endif

# One BLAS thread per process: the models of the tests are too small to share.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-kernels lint format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## Install, answer a sample question pass by pass, and compare with mlx-lm
	@$(RUN) $(BIN)/python benchmarks/side_by_side.py

test: $(VENV)/.tested ## Install with the test extras and run the tests
	$(RUN) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(PYTEST_ARGS)

test-newest: ## The tests with the newest packages that pyproject.toml allows, in .venv-newest
	@$(MAKE) test VENV=.venv-newest LOCK=

test-kernels: $(VENV)/.tested ## Parity and training tests with each BLAS kernel that this processor can run (x86-64 Linux)
	@for kernel in Haswell Zen $$(grep -qm1 avx512f /proc/cpuinfo 2>/dev/null && echo SkylakeX); do \
	  echo "== OPENBLAS_CORETYPE=$$kernel"; \
	  OPENBLAS_CORETYPE=$$kernel $(RUN) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(KERNEL_TESTS) || exit; \
	done

lint: $(VENV)/.tested ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.tested ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.created ## Renew the locked packages in lock/
	@$(PIP) install --upgrade uv
	@PATH="$$PWD/$(BIN):$$PATH" scripts/lock

clean: ## Remove the environments and the caches
	rm -rf $(VENV) .venv-newest .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo 'make: Python 3.11 or newer is needed; set PYTHON=/path/to/python3' >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && { apt-get update -qq && apt-get install -y -qq python3-venv; } >/dev/null 2>&1 \
	       && $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo 'make: cannot create a virtual environment; install python3-venv, or set PYTHON' >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(wildcard lock/*)
	@echo '== installing specstream-mlx'
	@$(INSTALL)
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo '== installing what tests and checks need'
	@$(INSTALL_DEV)
	@$(PIP) check
	@touch $@
