#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly and reports no error.
#
# The interpreter keeps bfloat16 values as 16-bit unsigned integers. Additions and tl.dot then work on those integers, so the
# result is no number that bfloat16 arithmetic could give. The same kernels are right in float16. A test of a bfloat16 kernel in
# the interpreter therefore shows nothing, or fails for no fault of the kernel: run it in float16 or float32, or convert to
# float32 before every operation.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   triton 3.9.0 torch 2.13.0+cpu
#   torch.float16: 1.5 + 2.25 = 3.75; sum of 16 products 1 * 1 by tl.dot = 16.0
#   torch.bfloat16: 1.5 + 2.25 = nan; sum of 16 products 1 * 1 by tl.dot = 4228120576.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def dot(x, y, out):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + i, tl.dot(tl.load(x + i), tl.load(y + i)))


print("triton", triton.__version__, "torch", torch.__version__)
right = {}
for dtype in (torch.float16, torch.bfloat16):
    x, y = torch.full((16,), 1.5, dtype=dtype), torch.full((16,), 2.25, dtype=dtype)
    total = torch.empty_like(x)
    add[(1,)](x, y, total, N=16)
    ones, product = torch.ones(16, 16, dtype=dtype), torch.empty(16, 16)
    dot[(1,)](ones, ones, product)
    print(f"{dtype}: 1.5 + 2.25 = {total[0].item()}; sum of 16 products 1 * 1 by tl.dot = {product[0, 0].item()}")
    right[dtype] = total[0].item() == 3.75, product[0, 0].item() == 16
sys.exit(right != {torch.float16: (True, True), torch.bfloat16: (False, False)})
PYTHON
TRITON_INTERPRET=1 venv/bin/python finding.py
