# The README's commands. Everything runs in .venv, with the versions of constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
PORT ?= 8000
export RAY_USAGE_STATS_ENABLED = 0
# empty: every worker of Ray reads bytecode instead of compiling the project anew
export PYTHONDONTWRITEBYTECODE =

.PHONY: install test fast check coverage docs demo serve bench chaos release-check clean

install: $(VENV)/.installed

# torch first and pinned: any other version is a CUDA build of gigabytes
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev,bench]"
	touch $@

# on two processes: those without a cluster, then those with one (a Ray cluster for each process)
test: install
	$(BIN)/python -m pytest -m "not ray" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m ray -n 2 --dist loadfile --no-loadscope-reorder --durations=15

fast: install
	$(BIN)/python -m pytest -m "not ray and not slow" -n 2 --dist loadfile --no-loadscope-reorder

# of lines in the rooms that know no Ray
coverage: install
	$(BIN)/python -m pytest -m "not ray" -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

docs: install
	$(BIN)/mkdocs build --strict --quiet

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m jobs.demo --out runs/demo --port $(PORT)

serve: install
	$(BIN)/python -m jobs.serve $(RUN) --port $(PORT)

bench: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.loop_overhead
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.evaluate_small
	$(BIN)/python -m benchmarks.evaluate
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.feed
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.prepare --curve 1e6,1e7,1e8
	$(BIN)/python -m benchmarks.append
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quality
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quality_best
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.multitask_vs_single --trials 2 --seeds 6
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.multitask_vs_single --trials 2 balancing.kind=famo
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.encode
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.pretraining
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.text_value
	$(BIN)/python -m benchmarks.exact_topk
	$(BIN)/python -m benchmarks.ann
	$(BIN)/python -m benchmarks.batch_pipeline
	$(BIN)/python -m benchmarks.batch_kill
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.scoring_int8
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_latency
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_soak --minutes 30
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_faults
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_autoscale
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.profiles
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ranking_tasks
	$(BIN)/python -m benchmarks.balancer_cost
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.trunks
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.task_grid
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.retail_tasks
	$(BIN)/python -m benchmarks.gpu_step || test $$? = 2  # 2: there is no GPU
	$(BIN)/python -m benchmarks.vs_sasrec
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.against_peers
	$(BIN)/python -m benchmarks.scaling

chaos: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_faults
	$(BIN)/python -m benchmarks.batch_kill
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.chaos

# wheel and sdist, installed into an environment of its own, and the demo from there
release-check: install
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv dist/env
	dist/env/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	dist/env/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[demo]"
	mkdir dist/away && cd dist/away && HF_HUB_OFFLINE=1 ../env/bin/python -m jobs.demo --out runs/demo --port $(PORT)

clean:
	rm -rf runs .data dist site
