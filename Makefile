# make repro   set up, run the pipeline, print the results
# make test    set up, run the tests
# make help    list the targets

PYTHON ?= python3
# Extra options for pip's installation of torch, such as an index of CPU-only or CUDA builds.
TORCH_OPTIONS ?=
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH :=
export DVC_NO_ANALYTICS := 1

.PHONY: help clone moved repro test browser bench lint format lab clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

clone:
	@test -w . || { echo "error: $(CURDIR) cannot be written, and everything that a run makes goes there; remedy: make it writable, or git clone it to another folder"; exit 1; }
	@command -v git > /dev/null || { echo "error: git is not installed, and DVC needs it; remedy: install git"; exit 1; }
	@git rev-parse --is-inside-work-tree > /dev/null 2>&1 || { echo "error: DVC needs git and a git clone, and $(CURDIR) is none (a ZIP has no history); remedy: git clone the repository, or here: git init && git add -A && git commit -m start"; exit 1; }

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_OPTIONS) torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,pipeline,eval,dev]'
	@$(BIN)/python -m f2llm fetch nano
	@echo '$(CURDIR)' > .venv/installed

moved: .venv/installed
	@test ! -s .venv/installed || test "$$(cat .venv/installed)" = '$(CURDIR)' || echo "note: .venv was made in $$(cat .venv/installed): make works here, but .venv/bin/activate and the scripts f2llm and dvc name that folder; remedy: rm -r .venv, and make sets it up again"

repro: clone moved  ## run the whole pipeline for the configured size, print the results
	@start=$$(date +%s) && python -m dvc repro && python -m f2llm summary --seconds $$(( $$(date +%s) - start ))

test: .venv/installed  ## run all tests, in two processes
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

browser: .venv/installed  ## drive JupyterLab in Chromium (which must be installed), as a test
	@python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@python -m pytest tests/pipeline/test_jupyterlab.py

bench: .venv/installed  ## measure speed and memory on this CPU (about an hour), write benchmarks/README.md
	@for name in training encode memory distillation sharding prune data evaluation lora plan; do python -m benchmarks.$$name || exit 1; done
	@python -m benchmarks.table

lint: .venv/installed  ## check the style of code and notebooks, and that notebooks have no outputs
	@python -m ruff check . && python -m ruff format --check .
	@python -m nbstripout --verify --keep-id notebooks/*.ipynb notebooks/explore/*.ipynb

format: .venv/installed  ## format code and notebooks, remove outputs
	@python -m ruff check --fix --quiet . ; python -m ruff format --quiet .
	@python -m nbstripout --keep-id notebooks/*.ipynb notebooks/explore/*.ipynb

lab: .venv/installed  ## open the notebooks in JupyterLab
	@python -m pip install --quiet --disable-pip-version-check -c constraints.txt jupyterlab
	@python -m jupyterlab notebooks

clean:  ## remove the pipeline's outputs, keep .venv and the DVC cache
	@rm -rf build models data/assembled data/mined scratch runs/*.ipynb runs/*.html
