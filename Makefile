# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo model, unless a key of a real one is set.
DEMO := $(if $(OPENAI_API_KEY),,--demo)
BIND ?= 127.0.0.1:8000
# BIND= is for both, but their defaults differ.
SHOP ?= $(if $(filter-out file,$(origin BIND)),$(BIND),127.0.0.1:8001)

.PHONY: run example test check long floors bench debian node clean

run: $(VENV)/.run
	@$(BIN)/agentao-web serve $(DEMO) --bind $(BIND)

example: $(VENV)/.example
	@echo "A shop with an agent: http://$(SHOP), log in as ann, password demo"
	@cd examples/shop && $(CURDIR)/$(BIN)/flask --app shop fill && \
	  exec $(CURDIR)/$(BIN)/gunicorn -c python:agentao_web.workers --bind $(SHOP) 'shop:create_app()'

test: check
	$(BIN)/python -m pytest -n 5 --dist worksteal -m "not long"

check: $(VENV)/.test debian node
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

long: $(VENV)/.test debian node
	$(BIN)/python -m pytest -m long

# A part of the tests with exactly the lowest versions that pyproject.toml allows.
FLOORS := $(VENV)-floors
TOOLS := hypothesis jsonschema openapi-spec-validator opentelemetry-sdk playwright pytest \
  pytest-xdist PyYAML requests waitress
floors: $(FLOORS)/.test debian
	$(FLOORS)/bin/python -m pytest -n 4 --dist worksteal -p no:anyio -m "not long" \
	  tests/agents tests/client/test_docs.py tests/client/test_chat.py tests/core tests/store tests/test_views.py tests/test_auth.py \
	  tests/test_metrics.py tests/test_traces.py tests/test_real_agents.py tests/test_host_tools.py \
	  tests/security/test_mcp.py tests/live/test_gunicorn.py tests/live/test_tools.py

$(FLOORS)/.test: pyproject.toml tests/floors.py $(VENV)/.test
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(BIN)/python -m tests.floors > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(FLOORS)/floors.txt --editable '.[example,gevent,metrics,otel,postgres]' \
	  $(TOOLS)
	touch $@

bench: $(VENV)/.test
	$(BIN)/python -m bench.run

# Not --quiet: the first time takes minutes, and pip shows what it downloads.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --editable

$(VENV)/.run: pyproject.toml
	@test -x $(BIN)/python || { echo "Making a virtual environment in $(VENV) ..."; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "Installing agentao-web and about 50 packages it needs into $(VENV) ..."
	@$(PIP) .
	@touch $@

$(VENV)/.example: $(VENV)/.run
	@echo "Installing what the example needs ..."
	@$(PIP) '.[example]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "Installing what the tests need ..."
	@$(PIP) '.[test]'
	@touch $@

# What the tests need of Debian: a PostgreSQL of their own, openssl for a certificate,
# bubblewrap for the shell's sandbox, nginx, systemd to look at its unit, a browser, and what the
# recipes of the docs use.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
debian:
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && command -v openssl >/dev/null && \
	  command -v bwrap >/dev/null && { command -v nginx || test -x /usr/sbin/nginx; } >/dev/null && \
	  command -v systemd-analyze >/dev/null && command -v chromium >/dev/null && \
	  command -v curl >/dev/null && command -v jq >/dev/null || \
	  { echo "Installing what the tests need of Debian ..."; $(SUDO) apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends \
	      postgresql openssl bubblewrap nginx systemd chromium curl jq >/dev/null; }

# Clients of other people, and what generates them: tests/node/package-lock.json says which.
NODE := tests/node
node: $(NODE)/node_modules/.installed

$(NODE)/node_modules/.installed: $(NODE)/package.json $(NODE)/package-lock.json
	@{ command -v node && command -v npm; } >/dev/null || \
	  { $(SUDO) apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends \
	      nodejs npm >/dev/null; }
	cd $(NODE) && npm ci --loglevel=error
	touch $@

clean:
	rm -rf $(VENV) $(FLOORS) $(NODE)/node_modules build dist *.egg-info
