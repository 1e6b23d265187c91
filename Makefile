# `make demo` and `make test` set up what they need in .venv, once, and run.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := .ci/constraints.txt
# Without bytecode, which comes with the first import: to compile all of it took 80 s, and most of it is never imported.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint $(CONSTRAINTS)
MODEL := tests/data/dbrx-nano
TEXT := tests/data/war-of-the-worlds.txt
OUT := demo-out

# Two targets would install into .venv at once; each takes all cores by itself.
.NOTPARALLEL:

.PHONY: demo test lint types unit interpreter compiled bench clean

demo: .venv/installed
	rm -rf $(OUT)
	$(BIN)/dbrx-q quantize $(MODEL) $(OUT)/dbrx-nano-int4 --format int4
	$(BIN)/dbrx-q inspect $(OUT)/dbrx-nano-int4
	$(BIN)/dbrx-q generate $(OUT)/dbrx-nano-int4 --prompt "The old man looked at" --max-new-tokens 60 --temperature 0.7 --seed 1
	@echo "bf16:" && $(BIN)/dbrx-q perplexity $(MODEL) --text $(TEXT) --context 512
	@echo "int4:" && $(BIN)/dbrx-q perplexity $(OUT)/dbrx-nano-int4 --text $(TEXT) --context 512

test: lint types unit interpreter compiled

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

unit: .venv/installed-dev
	$(BIN)/pytest --ignore tests/kernels/ahead_of_time

# Triton's kernels in its interpreter, which is chosen for a whole process.
interpreter: .venv/installed-dev
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels/interpreter tests/dbrx_q/interpreter

# Triton's kernels compiled for every chip, without one.
compiled: .venv/installed-dev
	$(BIN)/pytest -n 2 tests/kernels/ahead_of_time

# A layer of DBRX's own dimensions: 6.7 GB of disk for it, 2 GB for the result.
bench: .venv/installed
	rm -rf $(OUT)/layer $(OUT)/layer-int4
	$(BIN)/dbrx-q bench synthetic $(OUT)/layer
	$(BIN)/dbrx-q quantize $(OUT)/layer $(OUT)/layer-int4
	$(BIN)/dbrx-q bench cpu $(OUT)/layer-int4

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

# In one step and not after the other: pip takes a minute to work out what fits together.
.venv/installed-dev: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[dev]'
	touch .venv/installed $@

clean:
	rm -rf .venv $(OUT) build dist *.egg-info
