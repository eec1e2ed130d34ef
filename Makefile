.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,postgres,s3]'
	touch $@

setup: .venv/.stamp ## a virtual environment with everything that the project needs

lint: setup ## ruff, ruff format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup ## the tests that CI runs, under 12 minutes on 2 cores
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: setup ## the long tests
	$(BIN)/python -m pytest -m slow

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: help setup lint test test-slow test-gpu
