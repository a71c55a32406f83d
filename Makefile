# Two commands: `make demo` and `make test`. Each makes .venv if it is not there, and installs.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

# glibc then asks for huge pages: a train step on a CPU takes three quarters of the time.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test slow lint venv clean help

help:
	@echo "make demo   train a tiny GPT-OSS on this machine, draw its curves, and ask it something"
	@echo "make test   the fast tests"
	@echo "make slow   the tests that take minutes"
	@echo "make lint   ruff and pyright"
	@echo "make clean  remove .venv and $(DEMO)"

demo: $(VENV)/installed
	@$(RUN) -m gptoss_jax.train --config configs/tiny.py --workdir $(DEMO)
	@echo
	@echo "Asking it a question that it was not trained on:"
	@$(RUN) -m gptoss_jax.sample --checkpoint $(DEMO) --prompt "sort 7 2 9 4 1 4" --reasoning low
	@echo
	@echo "Ask it yourself:  $(RUN) -m gptoss_jax.sample --checkpoint $(DEMO) --prompt 'sort 3 1 2' --reasoning low"

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 -m "not slow and not exhaustive"

slow: $(VENV)/installed
	$(RUN) -m pytest -n 2 -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) -m venv failed (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO)
