#!/usr/bin/env bash
# GGUFReader makes two numpy arrays for every entry of a list in a GGUF file's metadata.
#
# The tokens and merges of a vocabulary are lists of strings. For a vocabulary of 100,000 tokens the reader makes half a
# million small arrays before the first tensor is known: opening takes seconds and hundreds of megabytes, and reading the
# values takes seconds again, for metadata of a few megabytes. Nothing can be skipped or read later. A program that only
# wants the header of such a file has to walk it itself.
#
# Seen on 2026-11-29 (Python 3.11.7, Linux, 2 cores of an AMD EPYC, busy):
#   gguf 0.19.0 numpy 2.4.2
#   4.3 MB of metadata: 500,023 arrays, 4.5 s of processor time, 338 MB of memory
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.2
cd "$folder"
cat > finding.py <<'PYTHON'
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

print(*(f"{name} {version(name)}" for name in ("gguf", "numpy")))
TOKENS = 100_000
writer = GGUFWriter("vocabulary.gguf", "dbrx")
writer.add_token_list([f"token{n}" for n in range(TOKENS)])
writer.add_token_types([1] * TOKENS)
writer.add_token_merges([f"a{n} b{n}" for n in range(TOKENS)])
writer.add_tensor("output_norm.weight", np.zeros(4, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


before, started = resident(), time.process_time()
reader = GGUFReader("vocabulary.gguf")
seconds, memory = time.process_time() - started, resident() - before
arrays = sum(len(field.parts) for field in reader.fields.values())
size = Path("vocabulary.gguf").stat().st_size / 1e6
print(f"{size:.1f} MB of metadata: {arrays:,} arrays, {seconds:.1f} s of processor time, {memory:.0f} MB of memory")
sys.exit(not (arrays > 4 * TOKENS and memory > 10 * size))
PYTHON
venv/bin/python finding.py
