# make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export PYTHONPATH := .

.PHONY: help demo test test-slow lint smoke proof-fullsize proof-learning family render-env gpu-check docs clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Blender pins its Python and its numpy, hence an environment of its own (about 1 GB). With PYTHONPATH pip would find
# the checkout there, and complain that it lacks torch.
RENDER_VENV := .venv-render
$(RENDER_VENV)/.installed: constraints-render.txt
	python3.11 -m venv $(RENDER_VENV)
	PYTHONPATH= $(RENDER_VENV)/bin/pip install --quiet --disable-pip-version-check -r constraints-render.txt
	touch $@

render-env: $(RENDER_VENV)/.installed ## install Blender for build_data.py dataset=rendered

demo: $(VENV)/.installed ## set up, then the whole road on the mini family: build, caption, train, generate, evaluate
	PATH="$(CURDIR)/$(BIN):$$PATH" ./demo.sh

# One thread a process: matrices of the mini family are too small to gain from two.
test: $(VENV)/.installed ## set up, then every test
	@$(MAKE) --no-print-directory render-env || echo "no Blender here: the tests that render are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

test-slow: $(VENV)/.installed ## only the tests that take long: a wheel in a fresh environment, …
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

smoke: $(VENV)/.installed ## only the end-to-end tests: two steps, kill, resume, generate
	$(BIN)/python -m pytest tests/smoke

proof-fullsize: $(VENV)/.installed ## two steps, kill, resume and export at SDXL's real size on a CPU (20 GiB of memory)
	$(BIN)/python -m benchmarks.fullsize

proof-learning: $(VENV)/.installed ## a LoRA learns a look the base has never seen, three seeds and their controls
	$(BIN)/python -m benchmarks.learning

gpu-check: $(VENV)/.installed ## speed and memory at SDXL's shapes on one GPU, random weights, 8 minutes; writes docs/gpu.md
	$(BIN)/python -m benchmarks.gpu_check

family: $(VENV)/.installed render-env ## render for and train the mini family, from where the last run stopped (40 core hours)
	tools/mini/family.sh

docs: $(VENV)/.installed ## the documentation as a site in outputs/site
	$(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.installed ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

clean: ## remove the environment and everything that runs wrote
	rm -rf $(VENV) $(RENDER_VENV) outputs wandb .pytest_cache .ruff_cache .hypothesis
