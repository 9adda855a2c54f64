# `make demo` and `make test` do all the set-up on a fresh machine; a second call is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*)
DEMO_DIR ?= runs/demo
BENCH_DIR ?= docs/benchmarks
BENCHMARKS ?= spmm conv gemv nm group_kernels attention attention_selectors attention_caches \
  attention_quality attention_memory fftconv oneway networks transformer_networks peers \
  fast_sparse_convnets pruning_methods sparse_training tables scaling

.PHONY: help setup demo minilm test lint style types unit browser sanitize dist reproduce bench docs clean \
        test-sanitize test-threads fuzz

help:
	@echo "make demo           compress a real network and see it run faster (sets everything up first)"
	@echo "make test           lint, types, floors, tests, sanitizers, packages: what CI runs"
	@echo "make test-sanitize  kernel tests under AddressSanitizer and UBSan"
	@echo "make test-threads   tests of several threads under ThreadSanitizer"
	@echo "make fuzz           checkpoints damaged 200,000 times (AEROGEL_FUZZ=100000 of either kind)"
	@echo "make minilm         the longer example: a pretrained sentence encoder"
	@echo "make reproduce      the slow evidence: every experiment, then docs/evidence.md"
	@echo "make bench          every benchmark; tables go to docs/benchmarks"
	@echo "make dist           sdist and wheel in dist/"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --upgrade pip
	$(PIP) install -c constraints.txt torch numpy scikit-build-core nanobind
	touch $@

# The editable install compiles csrc/; it is repeated only when a native source changes.
$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE_SOURCES)
	$(PIP) install --no-build-isolation -c constraints.txt -e ".[dev,text,bench]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/aerogel compress --out $(DEMO_DIR)

minilm: setup
	$(BIN)/aerogel compress minilm --data wordnet-glosses --out runs/minilm

# The unit tests run on all cores; what runs on one, such as compilers, runs beside them.
test: style browser
	@mkdir -p build
	@$(MAKE) types test-sanitize test-threads dist >build/checks.log 2>&1 & checks=$$!; \
	$(MAKE) unit; status=$$?; \
	wait $$checks || status=$$?; cat build/checks.log; exit $$status

lint: style types

style: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

unit: setup browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# The report page is tested in a real browser. Without one (and without the right to install it)
# those tests skip and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	  echo "no Chromium here: browser tests will be skipped"

test-sanitize: setup
	bash tests/sanitize.sh memory $(BIN)/python

test-threads: setup
	bash tests/sanitize.sh threads $(BIN)/python

fuzz: setup
	$(BIN)/pytest -m slow tests/runtime/test_checkpoint_damage.py

# The wheel takes what `setup` compiled; that the sdist holds every source is checked beside it.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist . >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	bash tests/wheel_smoke.sh $(BIN)/python dist

reproduce: setup
	$(BIN)/aerogel reproduce --all --save

# README's table of systems, from the manifest. (docs/evidence.md comes with `make reproduce`.)
docs: setup
	$(BIN)/aerogel systems --into README.md

# Every benchmark with one thread and with two; the tables go to docs/benchmarks.
bench: setup
	set -e; for threads in 1 2; do for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py --threads $$threads --save $(BENCH_DIR); done; done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
