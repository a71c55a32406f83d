# Two commands: `make demo` and `make test`. Each makes .venv if it is not there, and installs.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo
AOT := .venv-aot
AOT_PYTHON ?= $(firstword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python3) python3.12)

# Each process takes neighbours, so that the fixtures of a file are made once. The slowest tests are
# listed at the end.
TESTS := -m pytest -n 2 --dist worksteal --durations 30 --durations-min 5
# Which cases of the slow tests run; empty: all. .ci/run gives "--in-turn --every 5 --part K".
CASES ?=

# glibc then asks for huge pages: a train step on a CPU takes three quarters of the time.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test slow test-aot plan lint venv constraints clean help

help:
	@echo "make demo   train a tiny GPT-OSS on this machine, draw its curves, and ask it something"
	@echo "make test   the fast tests"
	@echo "make slow   the tests that take minutes"
	@echo "make test-aot  compile the kernels for TPUs and an H200 that are not here"
	@echo "make plan   what a run takes on hardware that is not here: ARGS='--config FILE --target v5p:4x4x4'"
	@echo "make lint   ruff and pyright"
	@echo "make constraints  write the versions of .venv to constraints.txt"
	@echo "make clean  remove .venv and $(DEMO)"

demo: $(VENV)/installed
	@$(RUN) -m gptoss_jax.train --config configs/tiny.py --workdir $(DEMO)
	@echo
	@echo "Asking it a question that it was not trained on:"
	@$(RUN) -m gptoss_jax.sample --checkpoint $(DEMO) --prompt "sort 7 2 9 4 1 4" --reasoning low
	@echo
	@echo "Ask it yourself:  $(RUN) -m gptoss_jax.sample --checkpoint $(DEMO) --prompt 'sort 3 1 2' --reasoning low"

test: $(VENV)/installed
	$(RUN) $(TESTS) --quick -m "not slow and not aot and not exhaustive"

slow: $(VENV)/installed
	$(RUN) $(TESTS) --quick -m slow $(CASES)

# jax 0.11.2 with the compilers for TPU and H200, on Python 3.12 where there is one.
test-aot: $(AOT)/installed
	$(AOT)/bin/python $(TESTS) -m aot tests/aot $(CASES)

# Does it fit? make plan ARGS="--config configs/20b_v5e_4x8.py --target v5e:4x8"
plan: $(AOT)/installed
	@$(AOT)/bin/python -m gptoss_jax.plan $(ARGS)

$(AOT)/installed: pyproject.toml
	@test -x $(AOT)/bin/python || $(AOT_PYTHON) -m venv $(AOT)
	@echo "installing into $(AOT) ..."
	@$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[aot]'
	@touch $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports --no-logo --no-cache

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) -m venv failed (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The versions that the tests ran with. Local parts of versions, such as +cpu, are left out.
constraints: $(VENV)/installed
	@$(RUN) -m pip list --format=freeze --exclude-editable --disable-pip-version-check 2>/dev/null \
	  | sed 's/+.*//' | grep -v -E '^(gptoss[-_]jax|pip|setuptools|wheel)==' | sort -f > constraints.txt
	@echo "wrote constraints.txt: $$(wc -l < constraints.txt) packages"

clean:
	rm -rf $(VENV) $(DEMO)
