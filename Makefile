# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo model, unless a key of a real one is set.
DEMO := $(if $(OPENAI_API_KEY),,--demo)
BIND ?= 127.0.0.1:8000

.PHONY: run test check long bench clean

run: $(VENV)/.run
	@$(BIN)/agentao-web serve $(DEMO) --bind $(BIND)

test: check
	$(BIN)/python -m pytest -n 2 -m "not long"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

long: $(VENV)/.test
	$(BIN)/python -m pytest -m long

bench: $(VENV)/.test
	$(BIN)/python -m bench.run

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
