# `make demo` and `make test` do all the set-up on a fresh machine; a second call is quick.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/pip
PY := $(VENV)/bin/python
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*)

.PHONY: help setup build demo test test-all test-sanitize lint reproduce bench docs dist clean

help:
	@echo "make demo           compress a real network and see it run faster (sets everything up first)"
	@echo "make test           lint, types, contracts and the quick test suite (what CI runs)"
	@echo "make test-sanitize  kernel tests under AddressSanitizer and UBSan"
	@echo "make reproduce      the slow evidence: every experiment, docs/evidence.md"
	@echo "make bench          kernel benchmarks"
	@echo "make dist           sdist and wheel"

$(VENV)/.deps: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch numpy scikit-build-core nanobind
	touch $@

# The editable install compiles csrc/ once; it is repeated only when a native source changes.
$(VENV)/.native: $(VENV)/.deps $(NATIVE_SOURCES)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e ".[dev,text,bench]"
	touch $@

setup build: $(VENV)/.native
