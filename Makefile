# Every target makes what it needs; nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: ocr test lint bench clean
.DELETE_ON_ERROR:

# The whole road: render Chinese text lines, train, fold, export, verify, report -> runs/ocr
ocr: $(VENV)/.flatwater
	$(BIN)/flatwater ocr train --output runs/ocr

test: $(VENV)/.flatwater
	$(BIN)/python -m pytest

lint: $(VENV)/.flatwater
	$(BIN)/pip install --quiet '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.flatwater
	$(BIN)/python -m pip install --quiet '.[test,bench]'
	$(BIN)/python -m benchmarks --json benchmarks.json

# Reinstalled when a source changes, so that a target never runs yesterday's code.
SOURCES = pyproject.toml CMakeLists.txt $(shell find cpp src -type f -not -path '*/__pycache__/*')
$(VENV)/.flatwater: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '.[test]'
	touch $@

clean:
	rm -rf build $(VENV)
