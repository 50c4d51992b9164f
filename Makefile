# make repro   set up, run the pipeline, print the results
# make test    set up, run the tests
# make help    all targets

PYTHON ?= python3
# Extra words for pip's first install, such as an index of CPU-only or CUDA builds of torch.
TORCH_OPTIONS ?=
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH :=
export DVC_NO_ANALYTICS := 1

.PHONY: help repro test bench lint format lab clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_OPTIONS) torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,pipeline,eval,dev]'
	@touch .venv/installed

repro: .venv/installed  ## the whole pipeline on the configured size, then the results
	@start=$$(date +%s) && python -m dvc repro && python -m f2llm summary --seconds $$(( $$(date +%s) - start ))

test: .venv/installed  ## all tests
	@python -m pytest

bench: .venv/installed  ## speed and memory on this CPU, side by side (about an hour), then the README's table
	@for name in training encode matryoshka memory distillation prune data; do python -m benchmarks.$$name || exit 1; done
	@python -m benchmarks.table

lint: .venv/installed  ## style of code and notebooks; notebooks without outputs
	@python -m ruff check . && python -m ruff format --check .
	@python -m nbstripout --verify --keep-id notebooks/*.ipynb

format: .venv/installed  ## put code and notebooks in that style
	@python -m ruff check --fix --quiet . ; python -m ruff format --quiet .
	@python -m nbstripout --keep-id notebooks/*.ipynb

lab: .venv/installed  ## JupyterLab on the notebooks
	@python -m pip install --quiet --disable-pip-version-check -c constraints.txt jupyterlab
	@python -m jupyterlab notebooks

clean:  ## remove what the pipeline made, keep .venv and the DVC cache
	@rm -rf build models data/assembled data/mined scratch runs/*.ipynb runs/*.html
