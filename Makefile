# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv and runs/.

PYTHON ?= python3
BIN := .venv/bin
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

.PHONY: install demo test slurm check bench clean

install: .venv/installed

# torch first and exactly; deepspeed builds from source against it, so nothing is built in isolation.
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel ninja packaging numpy psutil py-cpuinfo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# Scenes of coloured shapes, a tokenizer for their captions, FILIP on two ranks, and a page to look at.
demo: install
	test -d runs/demo/data || $(BIN)/mmpt-data scenes runs/demo/data --train 8192 --held-out 512
	test -d runs/demo/tokenizer || $(BIN)/mmpt-data tokenizer runs/demo/data/train runs/demo/tokenizer --kind wordpiece --vocab-size 256
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_accelerators 2 mmpt/train.py --recipe filip.demo
	$(BIN)/mmpt report runs/demo --title "FILIP on drawn scenes"

test: install slurm
	$(BIN)/python -m pytest

# A SLURM of our own for tests/slurm, from Debian's packages where they may be installed; without them those tests are
# skipped by name.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
slurm:
	@if ! PATH="$$PATH:/usr/sbin" sh -c 'command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged' > /dev/null \
	    && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES)) > /dev/null 2>&1 \
	        || echo "$(SLURM_PACKAGES): not installed; tests/slurm will be skipped"; \
	fi

# A few minutes, for daily use: format, lint, types, and the tests that need no second process.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -m "not slow"

# Every benchmark, one after another: hours, of which seven.py takes most. Each can be run alone.
bench: install
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv build *.egg-info runs
