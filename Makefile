# agl_ray: every target sets up .venv by itself from the pinned lock (nothing but python3, make and a package index).
# Variables: PYTHON (the Python that makes .venv), SET (cpu or gpu: which lock), SEED and CONFIG (of the demo), SEEDS (of test-learning).

PYTHON ?= python3
SET ?= cpu
SEED ?= 0
CONFIG ?= configs/quickstart.yaml
SEEDS ?= 0 1 2

VENV := .venv
BIN := $(VENV)/bin
LOCK := cluster/locks/$(SET).lock
LOCKED := $(VENV)/.ready-$(SET)
READY := $(VENV)/.project-$(SET)
TEST_LOCK := cluster/locks/test.lock
VERL_LOCK := cluster/locks/verl.lock
TESTED := $(VENV)/.ready-test
# Other people's agent frameworks, in environments of their own; CrewAI does not go with the others.
FRAMEWORKS := .venv-frameworks/.ready .venv-crewai/.ready
# A test that hangs is a failed test; the longest whole run stays far below this.
PYTEST := $(BIN)/python -m pytest --timeout 900
SOURCES := agl_ray actors tests examples cluster

# Two OpenMP threads on two busy cores are ten times slower than one; nothing here asks a model hub for anything.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help venv venv-verl demo test test-fast test-frameworks test-verl test-learning lint typecheck fmt bench check locks clean

help: ## what can be made
	@echo "make TARGET [PYTHON=python3.11] [SET=cpu|gpu] [SEED=0]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(READY) ## set up .venv from the lock of SET

$(LOCKED): $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; name the Python to use: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) cluster/locks/install.py --lock $(LOCK) --venv $(VENV)
	@touch $@

# The project itself, editable: again when its metadata changes. The lock has setuptools, so nothing is downloaded.
$(READY): $(LOCKED) pyproject.toml
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
	@touch $@

# What only tests need, on top.
$(TESTED): $(READY) $(TEST_LOCK) $(VERL_LOCK)
	@$(PYTHON) cluster/locks/install.py --lock $(TEST_LOCK) --venv $(VENV) --add
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check \
		--target $(VENV)/verl --upgrade -r $(VERL_LOCK)
	@touch $@

demo: $(READY) ## train the calculator agent of the quickstart (SEED=0)
	@$(BIN)/agl-ray train $(CONFIG) seed=$(SEED)

test: $(TESTED) ## all tests: unit, property, integration, faults
	$(PYTEST) tests

test-fast: $(TESTED) ## the tests that need no minutes: unit, property, light integration
	$(PYTEST) -n 2 --dist loadfile tests/unit tests/property tests/integration -m "not slow"

.venv-%/.ready: cluster/locks/%.lock
	@$(PYTHON) cluster/locks/install.py --lock $< --venv .venv-$*
	@touch $@

# Ranks of `learner.backend: verl` run in it; the project is in it too, and its Python and Ray are those of .venv.
.venv-verl/.ready: cluster/locks/verl-env.lock pyproject.toml
	@$(PYTHON) cluster/locks/install.py --lock $< --venv .venv-verl
	@.venv-verl/bin/python -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
	@touch $@

venv-verl: .venv-verl/.ready ## set up .venv-verl, the environment of learner.backend verl

test-verl: $(TESTED) .venv-verl/.ready ## learner.backend verl: its engine against ours, and a whole run
	$(PYTEST) tests/verl

test-frameworks: $(READY) $(FRAMEWORKS) ## agents of other frameworks against the real gateway and engine
	$(PYTEST) tests/frameworks

test-learning: $(TESTED) ## the quickstart by five algorithms and three seeds (SEEDS="0 1 2"), 45 minutes
	SEEDS="$(SEEDS)" $(PYTEST) --timeout 1800 -s tests/learning

lint: typecheck ## ruff, types, floors
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

typecheck: $(READY) ## mypy, strict
	$(BIN)/mypy

fmt: $(READY) ## format and mend what ruff can mend
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(READY) ## the loop against the ideal, quick (bench-e2e.json)
	$(BIN)/agl-ray bench e2e --quick --json bench-e2e.json

check: $(READY) ## is this machine fit for the demo; what to mend
	$(BIN)/agl-ray check $(CONFIG)

locks: ## compile cluster/locks/*.lock anew (needs uv and a package index)
	$(PYTHON) cluster/locks/compile.py

clean: ## remove .venv, caches and made models; runs/ stays
	rm -rf $(VENV) .venv-frameworks .venv-crewai .venv-verl .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build dist
