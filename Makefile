.DELETE_ON_ERROR:
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("KalamDB needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@if command -v uv >/dev/null; then uv venv -q --allow-existing --python $(PYTHON) .venv && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'; fi
	@touch $(STAMP)

demo: $(STAMP) ## load the flights of 2013 and show what the database does
	$(BIN)/python demo/flights.py

test: $(STAMP) ## all tests but the long ones
	$(BIN)/pytest -q

test-long: $(STAMP) ## the full counts too
	$(BIN)/pytest -q -m "long or not long" --timeout 3600

check: $(STAMP) ## lint, types, import contracts
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove what the targets made
	rm -rf .venv build dist demo-data .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help demo test test-long check clean
