# make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test lint smoke clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed ## set up, then the whole road on the mini family: build, caption, train, generate, evaluate
	PATH="$(CURDIR)/$(BIN):$$PATH" ./demo.sh

test: $(VENV)/.installed ## set up, then every test
	$(BIN)/python -m pytest tests

smoke: $(VENV)/.installed ## only the end-to-end tests: two steps, kill, resume, generate
	$(BIN)/python -m pytest tests/smoke

lint: $(VENV)/.installed ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

clean: ## remove the environment and everything that runs wrote
	rm -rf $(VENV) outputs wandb .pytest_cache .ruff_cache .hypothesis
