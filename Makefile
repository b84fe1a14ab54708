# Two commands: `make train` and `make test`. Each makes the environment first if it is not there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CFG    ?= configs/quickstart.yaml
RUN    ?= runs/$(basename $(notdir $(CFG)))-$(shell date +%Y%m%d-%H%M%S)
TESTS  ?= tests
WORKERS ?= 2

.PHONY: train test test-faults test-slurm check format clean

train: $(VENV)/installed
	$(BIN)/dist-attn train --cfg $(CFG) --set run.dir=$(RUN)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# Kills, stops, stalls, long runs, and further cases of what `make test` has: too slow for every change.
test-faults: $(VENV)/installed
	$(BIN)/python -m pytest -m slow $(TESTS)

# A SLURM of two nodes on this machine, for the length of the test. As root, on Debian or Ubuntu.
test-slurm: $(VENV)/installed
	@export PATH="$$PATH:/usr/sbin"; command -v slurmctld && command -v slurmd && command -v sbatch || \
	  { apt-get update -q && apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slurm tests/slurm

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_import_direction.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV): about two minutes and 2.5 GB (more where torch brings CUDA)"
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
