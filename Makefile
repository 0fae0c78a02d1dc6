# make demo   install into .venv, run the main job on the embedded model, print its results
# make test   install the test extra, run the tests
# make help   the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= all
CONFIG ?= workflow/config/demo.yaml
# Jobs that may share a GPU at a time. The demo's model is small; large ones want the GPU for themselves.
GPU_JOBS ?= 1
RUN = results/$(shell $(BIN)/patch-llm config name --config $(CONFIG))

# The PyTorch to install where there is none yet. `make demo TORCH=...` takes any pip requirement and options.
TORCH ?= torch==2.13.0

export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo run unlock dry-run report show test lint docs reference install clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -3
	@echo "make run CONFIG=workflow/config/….yaml    run another grid; make dry-run CONFIG=… shows it"
	@echo "make lint    ruff, mypy, snakefmt, snakemake --lint;   make docs    regenerate schema and key list"
	@echo "make reference    what is committed of workflow/config/smollm2.yaml, from its finished run"

demo: GPU_JOBS = 4
demo: run

run: $(VENV)/.installed
	@snakemake --configfile $(CONFIG) --cores $(CORES) --resources gpu=$(GPU_JOBS) --rerun-incomplete --logger patch
	@snakemake --configfile $(CONFIG) --report $(RUN)/report.html --quiet all
	@patch-llm show $(RUN)/runs.parquet
	@echo "Report:     $(RUN)/report.html"
	@echo "Tables:     $(RUN)/tables/    Figures: $(RUN)/figures/    Runs: $(RUN)/runs.csv"
	@echo "MLflow UI:  $(BIN)/mlflow ui --backend-store-uri sqlite:///results/mlflow.db --host 127.0.0.1"

# After a run that was killed the hard way: Snakemake's lock on this folder stays behind.
unlock: $(VENV)/.installed
	@snakemake --configfile $(CONFIG) --unlock

dry-run: $(VENV)/.installed
	@snakemake --dry-run --configfile $(CONFIG)

test: $(VENV)/.installed-test
	pytest -n auto

lint: $(VENV)/.installed-test
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

docs: $(VENV)/.installed
	patch-llm config docs

# What is committed of the study on the embedded model, from its finished run below results/smollm2 (no GPU needed).
# STALE=--stale takes records that other code has made.
STUDY := results/reference/smollm2
reference: $(VENV)/.installed
	patch-llm collect --config workflow/config/smollm2.yaml --output $(STUDY)/runs.parquet $(STALE)
	rm $(STUDY)/runs.csv $(STUDY)/experiment.json
	snakemake tables figures --cores 2 --configfile workflow/config/reference.yaml --quiet all
	cd results/smollm2-report && cp tables/accuracy.md tables/accuracy.csv tables/tasks.md tables/comparisons.md \
	  tables/claims.md figures/perplexity_vs_sparsity.png figures/accuracy_vs_sparsity.png ../../$(STUDY)/

install: $(VENV)/.installed

# A PyTorch that the interpreter already has is used as it is: nothing gigabyte-sized is downloaded twice.
$(BIN)/python:
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11)" || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); call make with PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt workflow/plugins/pyproject.toml slurm/pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --editable workflow/plugins --editable slurm
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]" --editable workflow/plugins --editable slurm
	@touch $@

clean:
	rm -rf results/demo results/state logs .snakemake
