# make quickstart   installs, draws a sample data set, and runs every stage on it
# make test         installs what tests need, and runs them in two processes: about 20 minutes on 2 cores (JOBS=n takes n)
# make nightly      the tests that take longer, and those of untrusted input with more examples: some 40 minutes
# make chaos        processes killed, stopped and cut off from one another, over and over, with a table of it at the end: about
#                   90 minutes on 2 cores (the sum of its parts); SEED=n repeats a run, ALL=1 takes every storage call of a
#                   save where else some are drawn, and every damage of a file: some hours more
# make benchmark    what a save, a restart and preemptions cost on this machine: half an hour; tools/bench_*.py has the others
# make benchmark-check   whether loader, step and start are as fast as they were, by ratios: about four minutes
# make fuzz         the tests of untrusted input with many more examples, for as long as it takes; SEED=n repeats a run
# make lint         formatting, lint, types, links of the docs, and the size and shape of the code;  make format mends the first two
# make docs         the site of the docs, in build/site
# make lock         resolves pyproject.toml anew into requirements.lock
# VENV=path and PYTHON=python3.12 choose the environment and the interpreter it is made with.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart install test nightly chaos benchmark benchmark-check fuzz docs lint format lock clean

quickstart: $(INSTALLED)
	$(BIN)/python tools/make_sample_data.py data/sample
	$(BIN)/python -m dpkd.pretrain --config configs/quickstart.yaml

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else f"dpkd runs on Python 3.11 to 3.14, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV): about 6 GB with the CUDA libraries of torch, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not chaos and not nightly and not serial" -n $(JOBS) --dist loadgroup --no-loadscope-reorder
	$(BIN)/python -m pytest -m "serial and not chaos and not nightly" -n 2 --dist loadgroup --no-loadscope-reorder

nightly: $(INSTALLED)
	$(BIN)/python -m pytest -m nightly
	$(BIN)/python -m pytest tests/fuzz -m "not chaos" --hypothesis-profile=nightly

chaos: SEED := $(or $(SEED),20261125)
chaos: REPORT := $(or $(REPORT),build/chaos-$(shell date +%Y%m%d-%H%M%S).jsonl)
chaos: $(INSTALLED)
	@echo "seed $(SEED): make chaos SEED=$(SEED) repeats this run; its faults go to $(REPORT)"
	DPKD_CHAOS_SEED=$(SEED) DPKD_CHAOS_ALL=$(ALL) DPKD_CHAOS_REPORT=$(REPORT) $(BIN)/python -m pytest -m chaos; \
	    status=$$?; $(BIN)/python tools/chaos_report.py $(REPORT) && exit $$status

benchmark: $(INSTALLED)
	$(BIN)/python -m tools.bench_checkpoint
	$(BIN)/python -m tools.bench_recovery --launcher local --fault kill
	$(BIN)/python -m tools.bench_goodput

benchmark-check: $(INSTALLED)
	$(BIN)/python -m tools.benchmark_check

fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz: $(INSTALLED)
	@echo "seed $(SEED): make fuzz SEED=$(SEED) repeats this run"
	$(BIN)/python -m pytest tests/fuzz --timeout=0 --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

lint: $(INSTALLED) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --custom-compile-command "make lock" --extra dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache build *.egg-info
