#!/usr/bin/env bash
# In Triton 3.9 a row whose base pointer comes from tl.where is loaded byte by byte; Triton 3.6 and 3.7 load 16 bytes at a time.
#
# Two matrices in one tile, as the gate and up projections of an expert: the base pointer of each row is chosen with tl.where from
# two pointers that the launch knows to be divisible by 16. Triton 3.9 forgets the divisibility at the select, so every element is a
# load of its own: 16 times as many loads, and enough registers for their addresses that a larger kernel spilled 200 bytes. No
# warning tells of it, and the results are right. tl.multiple_of on the chosen pointers restores the wide loads.
#
# Seen on 2026-11-29 (Python 3.11.7, Linux, no GPU: the code compiled for sm_90 is read):
#   triton 3.6.0: loads of 16 bytes; with tl.multiple_of: of 16 bytes
#   triton 3.9.0: loads of 1 byte; with tl.multiple_of: of 16 bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > finding.py <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy_rows(gate, up, out, K: tl.constexpr, HINT: tl.constexpr):
    row = tl.arange(0, 128)
    first = tl.where(row < 64, gate + row * K, up + (row - 64) * K)
    if HINT:
        first = tl.multiple_of(first, 16)
    column = tl.arange(0, 64)
    tl.store(out + row[:, None] * 64 + column[None, :], tl.load(first[:, None] + column[None, :]))


def bytes_of_loads(hint):
    signature = {"gate": "*u8", "up": "*u8", "out": "*u8", "K": "constexpr", "HINT": "constexpr"}
    divisible = {(argument,): [["tt.divisibility", 16]] for argument in range(3)}
    source = ASTSource(copy_rows, signature, {"K": 3072, "HINT": hint}, divisible)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True}).asm["ptx"]
    [size] = {int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(r"ld\.global\.(?:v(\d)\.)?b(\d+)", ptx)}
    return size


def words(size):
    return f"{size} byte{'s' * (size > 1)}"


plain, hinted = bytes_of_loads(False), bytes_of_loads(True)
print(f"triton {triton.__version__}: loads of {words(plain)}; with tl.multiple_of: of {words(hinted)}")
sys.exit((plain, hinted) != {"3.6.0": (16, 16), "3.9.0": (1, 16)}[triton.__version__])
PYTHON
for version in 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version" numpy==2.4.6
    TRITON_CACHE_DIR="$folder/cache-$version" "$folder/$version/bin/python" finding.py
done
