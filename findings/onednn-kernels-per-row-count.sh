#!/usr/bin/env bash
# torch's bfloat16 linear on a CPU takes more memory with every new number of rows.
#
# oneDNN, which computes it, compiles a kernel for every shape and keeps the last 1,024 of them. A mixture of experts gives
# each expert another number of tokens in every layer of every prompt, so the memory of the process grows for a long time
# although no tensor is kept. With one number of rows the same calls take no more memory, nor do they in float32, which
# another library computes. Filling up the rows with zeros to one of a few numbers avoids it.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   torch 2.13.0+cpu oneDNN True 3.12.0
#   torch.float32, 300 calls, one number of rows: 7 MB more
#   torch.float32, 300 calls, 300 numbers of rows: -2 MB more
#   torch.bfloat16, 300 calls, one number of rows: 0 MB more
#   torch.bfloat16, 300 calls, 300 numbers of rows: 223 MB more
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

CALLS = 300


def resident() -> float:
    """Megabytes that the process has in memory."""
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6


def growth(dtype: torch.dtype, *, rows_differ: bool) -> float:
    weight, x = torch.ones(512, 512, dtype=dtype), torch.ones(2 * CALLS, 512, dtype=dtype)
    for _ in range(3):
        F.linear(x, weight)
    before = resident()
    for call in range(CALLS):
        F.linear(x[: CALLS + call] if rows_differ else x, weight)
    return resident() - before


print("torch", torch.__version__, "oneDNN", torch.backends.mkldnn.is_available(), torch.__config__.show().split("MKL-DNN v")[1][:6])
grown = {}
for dtype in (torch.float32, torch.bfloat16):
    for rows_differ in (False, True):
        grown[dtype, rows_differ] = growth(dtype, rows_differ=rows_differ)
        name = f"{CALLS} numbers of rows" if rows_differ else "one number of rows"
        print(f"{dtype}, {CALLS} calls, {name}: {grown[dtype, rows_differ]:.0f} MB more")
wide = grown.pop((torch.bfloat16, True))
sys.exit(wide < 30 or wide < 3 * max(grown.values()))
PYTHON
venv/bin/python finding.py
