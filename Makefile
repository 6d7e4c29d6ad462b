# Two commands are all a person needs: `make demo` and `make test`. `make help` lists the others.

PYTHON ?= python3

BIN := .venv/bin
INSTALLED := .venv/.installed
PEER_INSTALLED := .venv-peer/.installed
VLLM_INSTALLED := .venv-vllm/.installed
GENERATOR_INSTALLED := .venv-generator/.installed
PIP_FLAGS := --disable-pip-version-check --no-input --quiet --quiet
LINTED := api benchmarks cli compression migrations tests worker

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test chaos check test-peer test-vllm test-generator bench results lock clean

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with everything in requirements.lock; does nothing when nothing changed

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo 'Bitmill needs Python 3.11 to 3.13; name one with: make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'Making .venv ...'
	@$(PYTHON) -m venv .venv
	@echo 'Installing what requirements.lock names (the first time: one or two minutes, 1.6 GB on disk) ...'
	@$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.lock
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@
	@echo 'Installed.'

demo: install  ## compress a real model through the real service, and ask it a question
	@$(BIN)/python -m cli.demo

test: install  ## all tests that need nothing but .venv
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile -m 'not peer and not vllm and not generator'

chaos: install  ## kill all parts of the service at random for MINUTES (10), as SEED says; then embedded, half as long
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

check: install  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/lint-imports

test-peer: install $(PEER_INSTALLED)  ## compare with LLM Compressor, in a virtual environment of its own
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m peer

$(PEER_INSTALLED): tests/conformance/requirements-peer.txt
	@echo 'Making .venv-peer ...'
	@$(PYTHON) -m venv .venv-peer
	@.venv-peer/bin/python -m pip install $(PIP_FLAGS) -r tests/conformance/requirements-peer.txt
	@touch $@

test-vllm: install $(VLLM_INSTALLED)  ## load and run compressed checkpoints in vLLM on the CPU, in a virtual environment of its own
	@$(BIN)/python -m pytest -m vllm

# torchvision, torchaudio and torchcodec break the import of this build of vLLM, and text models need none of them.
$(VLLM_INSTALLED): tests/conformance/requirements-vllm.txt
	@echo 'Making .venv-vllm (about 3 GB) ...'
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install $(PIP_FLAGS) -r tests/conformance/requirements-vllm.txt
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-generator: install $(GENERATOR_INSTALLED)  ## generate a client from docs/openapi.json and use it, in a virtual environment of its own
	@$(BIN)/python -m pytest -m generator

$(GENERATOR_INSTALLED): tests/conformance/requirements-generator.txt
	@echo 'Making .venv-generator ...'
	@$(PYTHON) -m venv .venv-generator
	@.venv-generator/bin/python -m pip install $(PIP_FLAGS) -r tests/conformance/requirements-generator.txt
	@touch $@

bench: install $(PEER_INSTALLED)  ## time and score Bitmill and LLM Compressor side by side
	@$(BIN)/python -m benchmarks

results: install $(PEER_INSTALLED)  ## write docs/results.md: perplexities beside LLM Compressor's; what was measured is kept
	@$(BIN)/python -m benchmarks.results

# Pins stay where they are unless the file is removed first: rm requirements.lock && make lock upgrades everything.
lock:  ## write requirements.lock and requirements-api.lock again from pyproject.toml
	@touch requirements.lock && cp requirements.lock .lock-constraints
	@$(call freeze,[engine$(comma)dev$(comma)otel],requirements.lock)
	@cp requirements.lock .lock-constraints
	@$(call freeze,[otel],requirements-api.lock)
	@rm -r .venv-lock .lock-constraints

# $(call freeze,extras,file): what a fresh environment with these extras holds. A local suffix such as torch's
# +cpu names one build of a release, not the release, so it is left out.
comma := ,
define freeze
echo 'Resolving $(2) ...' && \
$(PYTHON) -m venv --clear .venv-lock && \
.venv-lock/bin/python -m pip install $(PIP_FLAGS) -c .lock-constraints 'setuptools>=77' && \
.venv-lock/bin/python -m pip install $(PIP_FLAGS) -c .lock-constraints --no-build-isolation -e '.$(1)' && \
{ echo '# Made by `make lock`; do not edit.'; \
  .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude wheel --exclude-editable | sed 's/+[^ ]*$$//'; \
} > $(2).new && mv $(2).new $(2)
endef

clean:  ## remove caches, build outputs and the demo's folder; the virtual environments stay
	rm -rf .demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +
