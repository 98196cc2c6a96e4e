.DELETE_ON_ERROR:
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
CODE := src tests demo examples soak $(wildcard bench)
SOAK_MINUTES ?= 10

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("KalamDB needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@if command -v uv >/dev/null; then uv venv -q --allow-existing --python $(PYTHON) .venv && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'; fi
	@touch $(STAMP)

demo: $(STAMP) ## load the flights of 2013 and show what the database does
	$(BIN)/python demo/flights.py

serve: $(STAMP) ## serve ./data on 127.0.0.1:8080
	$(BIN)/kalamdb serve --data-dir data

test: $(STAMP) ## all tests but the long ones
	$(BIN)/pytest -q

test-long: SHELL := bash
test-long: $(STAMP) ## the long counts too; the output is kept in docs/evidence
	@mkdir -p docs/evidence
	@set -o pipefail; { echo "make test-long, $$(date -u +%Y-%m-%dT%H:%MZ)," \
	"commit $$(git rev-parse --short HEAD 2>/dev/null || echo unknown), $$(nproc) cores, $$($(BIN)/python -V)"; \
	$(BIN)/pytest -q -m "long or not long" --timeout 3600 --durations 15; } | tee docs/evidence/test-long.txt

soak: $(STAMP) ## random writers beside jobs against a model, for SOAK_MINUTES (10)
	SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python soak/engine.py

check: $(STAMP) ## format, lint, types, import contracts
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## measure speed, some minutes
	$(BIN)/python -m bench

bench-quick: $(STAMP) ## measure speed, in 90 seconds
	$(BIN)/python -m bench --quick

clean: ## remove what the targets made
	rm -rf .venv build dist *-data .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help demo serve test test-long soak check bench bench-quick clean
