.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/:/' | column -t -s:

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import ensurepip, venv' || ($(SUDO) apt-get update -q && $(SUDO) apt-get install -yq python3-venv)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,postgres,s3]'
	touch $@

tests/export/node_modules/.stamp: tests/export/package-lock.json
	command -v npm >/dev/null || ($(SUDO) apt-get update -q && $(SUDO) apt-get install -yq nodejs npm)
	npm --prefix tests/export ci --no-audit --no-fund --loglevel=error
	touch $@

.venv/.browser:
	command -v chromium || command -v google-chrome || ($(SUDO) apt-get update -q && \
	  $(SUDO) apt-get install -yq --no-install-recommends chromium) || echo "no Chromium: the web page's tests are skipped"
	mkdir -p .venv && touch $@

.venv/.postgresql: # best effort: without it the tests on PostgreSQL are skipped and say so
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || \
	 ($(SUDO) apt-get update -q && $(SUDO) apt-get install -yq --no-install-recommends postgresql) || \
	 echo 'PostgreSQL could not be installed: the tests on it are skipped'
	mkdir -p .venv && touch $@

.venv/prometheus/.stamp: .venv/.stamp # unpacked, not installed: nothing is to run beside the tests
	mkdir -p $(@D)
	command -v prometheus >/dev/null || (cd $(@D) && apt-get download -qq prometheus && dpkg -x prometheus_*.deb .) \
		|| echo "No Prometheus here (apt-get download prometheus): its test will be skipped."
	touch $@

setup: .venv/.stamp ## a virtual environment with everything that running viewmesh needs

demo: setup ## a sample capture, the service, a reconstruction over HTTP, a picture of it
	$(BIN)/python -m serve_app.demo demo

lint: setup ## ruff, ruff format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup .venv/.postgresql tests/export/node_modules/.stamp .venv/.browser .venv/prometheus/.stamp ## what CI runs: under 12 minutes on 2 cores
	$(BIN)/python -m pytest -m 'not slow and not gpu and not scale'

test-slow: setup ## the long tests
	$(BIN)/python -m pytest -m slow --timeout 1800

test-faults: setup ## kill, redeploy and restart the service
	$(BIN)/python -m pytest -m slow tests/serve_app --timeout 1800

test-stores: setup .venv/.postgresql ## the service on a real Ray, and its faults, on PostgreSQL and S3
	$(BIN)/python -m pytest tests/serve_app/test_on_ray.py tests/serve_app/test_postgres_on_ray.py \
	  tests/serve_app/test_faults.py tests/serve_app/test_lease.py --stores cloud --timeout 1800

test-scale: setup ## nodes that come and go, edits while jobs run: 15 minutes on 2 cores
	$(BIN)/python -m pytest -m scale tests/cluster --timeout 1800

soak: setup ## random kills for 15 minutes
	$(BIN)/python bench/serve.py soak --minutes 15

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: setup ## the figures of the README on the sample capture
	$(BIN)/viewmesh sample out/sample
	$(BIN)/python bench/reconstruct.py out/sample/six --test out/sample/transforms_test.json --mesh out/sample/mesh_gt.ply
	$(BIN)/python bench/reconstruct.py out/sample --test out/sample/transforms_test.json --mesh out/sample/mesh_gt.ply
	$(BIN)/python bench/raster.py

.PHONY: help setup demo lint test test-slow test-faults test-stores test-scale soak test-gpu bench
