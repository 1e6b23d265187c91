# `make demo` and `make test` set up what they need in .venv, once, and run.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := .ci/constraints.txt
# Without bytecode, which the first import writes: to compile all of it took 80 s, and most of it is never imported.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint $(CONSTRAINTS)
MODEL := tests/data/dbrx-nano
TEXT := tests/data/war-of-the-worlds.txt
OUT := demo-out

# Each command is a process: one that may not keep bytecode compiles all that it imports, for 4 s of 7.
unexport PYTHONDONTWRITEBYTECODE

# Two targets would install into .venv at once; each takes all cores by itself.
.NOTPARALLEL:

.PHONY: demo test lint types unit interpreter compiled long browser bench evaluation quantization bits parcel clean

demo: .venv/installed
	rm -rf $(OUT)
	$(BIN)/dbrx-q quantize $(MODEL) $(OUT)/dbrx-nano-int4 --format int4
	$(BIN)/dbrx-q inspect $(OUT)/dbrx-nano-int4
	$(BIN)/dbrx-q generate $(OUT)/dbrx-nano-int4 --prompt "The old man looked at" --max-new-tokens 60 --temperature 0.7 --seed 1
	@echo "bf16:" && $(BIN)/dbrx-q perplexity $(MODEL) --text $(TEXT) --context 512
	@echo "int4:" && $(BIN)/dbrx-q perplexity $(OUT)/dbrx-nano-int4 --text $(TEXT) --context 512

# mypy, which takes one core for half a minute, runs beside the first unit tests.
test: lint
	$(BIN)/mypy & types=$$!; $(MAKE) --no-print-directory unit interpreter compiled && wait $$types

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# A thread for each of the two processes: with more, threads that wait would take the cores from those that work.
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
unit: .venv/installed-dev browser
	$(ONE_THREAD) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 --ignore tests/kernels/ahead_of_time

# Chromium, in which the HTML report is tested: the system's, or Debian's where root can install it.
browser:
	@if command -v chromedriver && { command -v chromium || command -v chromium-browser || command -v google-chrome; }; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null; } \
		|| echo "Chromium could not be installed: the tests of the HTML report will be skipped."; \
	else echo "No Chromium with chromedriver on PATH: the tests of the HTML report will be skipped."; fi

# Triton's kernels in its interpreter, which is chosen for a whole process.
interpreter: .venv/installed-dev
	$(ONE_THREAD) TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/dbrx_q/interpreter tests/kernels/interpreter

# What takes most of a minute each and is no part of `make test`.
long: .venv/installed-dev
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m long

# Triton's kernels compiled for a chip of each kind, without one.
compiled: .venv/installed-dev
	$(BIN)/pytest -n 2 tests/kernels/ahead_of_time

# A layer of DBRX's own dimensions: 6.7 GB of disk for it, 2 GB for the result.
bench: .venv/installed
	rm -rf $(OUT)/layer $(OUT)/layer-int4
	$(BIN)/dbrx-q bench synthetic $(OUT)/layer
	$(BIN)/dbrx-q quantize $(OUT)/layer $(OUT)/layer-int4
	$(BIN)/dbrx-q bench $(OUT)/layer-int4 --n-gen 32

# The tables of docs/evaluation.md. GGUF: files of the bundled model that llama.cpp made, beside the one that is bundled.
GGUF :=
WIKITEXT := tests/data/wikitext2-test.txt
EVALUATED := $(OUT)/evaluation
evaluation: .venv/installed-dev
	rm -rf $(EVALUATED)
	for group in 32 64 128; do $(BIN)/dbrx-q quantize $(MODEL) $(EVALUATED)/int4-g$$group --format int4 --group-size $$group || exit 1; done
	$(BIN)/dbrx-q quantize $(MODEL) $(EVALUATED)/int8 --format int8
	$(BIN)/dbrx-q quantize $(MODEL) $(EVALUATED)/nf4 --format nf4
	$(BIN)/python tests/dbrx_q/sources/make_bitsandbytes.py $(MODEL) $(EVALUATED)/bitsandbytes-nf4
	$(BIN)/python tests/dbrx_q/sources/make_bitsandbytes.py $(MODEL) $(EVALUATED)/bitsandbytes-nf4-double --double
	$(BIN)/dbrx-q compare $(MODEL) $(EVALUATED)/int8 $(EVALUATED)/int4-g32 $(EVALUATED)/int4-g64 $(EVALUATED)/int4-g128 $(EVALUATED)/nf4 \
		$(EVALUATED)/bitsandbytes-nf4 $(EVALUATED)/bitsandbytes-nf4-double tests/data/dbrx-nano-gguf/dbrx-nano.Q4_0.gguf $(GGUF) \
		--text $(WIKITEXT) --context 512 --out $(EVALUATED)/report --document docs/evaluation.md --section divergence
	$(BIN)/dbrx-q compare $(MODEL) tests/data/dbrx-nano-gguf/dbrx-nano.Q4_0.gguf $(GGUF) \
		--text $(WIKITEXT) --protocol half-window --limit 200 --document docs/evaluation.md --section llama.cpp

# The tables and the plot of docs/quantization.md; a second call continues an interrupted run. TEXTS: what tests/methods/texts.py wrote.
TEXTS :=
METHODS := $(OUT)/methods
quantization: .venv/installed-dev
	@test -d "$(TEXTS)/final" || { echo "Name the folder that tests/methods/texts.py wrote: make quantization TEXTS=FOLDER"; exit 2; }
	$(BIN)/python tests/methods/protocol.py $(MODEL) $(METHODS) --texts $(TEXTS) --set final --gguf $(GGUF) \
		--plot docs/methods.png --document docs/quantization.md --section methods
	$(BIN)/python tests/methods/protocol.py tests/data/dbrx-micro $(METHODS) --texts $(TEXTS) --set final --only 'int4 g64' \
		--document docs/quantization.md --section second-model

# The tables and the plot of docs/quantization.md on formats of all sizes; a second call continues. BESIDE: the model in files and folders
# of other programs, such as those of tests/methods/ggml_types.py and tests/dbrx_q/sources/make_bitsandbytes.py.
BESIDE := tests/data/dbrx-nano-gguf/dbrx-nano.Q4_0.gguf
bits: .venv/installed-dev
	@test -d "$(TEXTS)/final" || { echo "Name the folder that tests/methods/texts.py wrote: make bits TEXTS=FOLDER"; exit 2; }
	$(BIN)/python tests/methods/bits.py $(MODEL) $(OUT)/bits --texts $(TEXTS) --beside $(BESIDE) \
		--plot docs/bits.svg --document docs/quantization.md

# The tree and the wheels that a GPU machine without a network lacks, for `sh parcel/run.sh bench gpu` there; the machine's Python: VERSION.
VERSION := 3.12
parcel: .venv/installed
	$(BIN)/python -m dbrx_q.eval.gpu_run.parcel --python $(VERSION)

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
