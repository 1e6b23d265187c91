#!/usr/bin/env bash
# On a CPU bitsandbytes dequantizes 4-bit weights with the wrong scales where a row is no whole number of blocks.
#
# quantize_4bit divides a weight into blocks as if it were flat, so a block may begin in one row and end in the next.
# dequantize_4bit takes the scale of element k of row r from place r * (K // blocksize) + k // blocksize, which is right
# only where blocksize divides K. Otherwise later rows get the scales of earlier ones, without an error. Weights of DBRX
# have no such rows at the default blocks of 64, those of other models and other block sizes do. The same values as one
# row of n elements (quant_state.shape = (1, n)) are dequantized rightly.
#
# Seen on 2026-11-29 (Python 3.11.7, Linux, 2 cores of an AMD EPYC with AVX-512):
#   bitsandbytes 0.50.2 torch 2.13.0+cpu
#   [40, 128] in blocks of 128: 0.0% of the values differ from code * scale, largest error 0.438
#   [40, 192] in blocks of 128: 85.7% of the values differ from code * scale, largest error 1.927 instead of 0.454
#   [40, 96] in blocks of 64: 86.3% of the values differ from code * scale, largest error 2.036 instead of 0.385
#   as one row [40, 192] has no wrong value
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print(*(f"{name} {version(name)}" for name in ("bitsandbytes", "torch")))
wrong = {}
for shape, block in (((40, 128), 128), ((40, 192), 128), ((40, 96), 64)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4")
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1)
    right = (state.code[codes.int()] * state.absmax.repeat_interleave(block)).view(shape)
    values = dequantize_4bit(packed, state)
    wrong[shape] = float((values != right).float().mean())
    error, least = (float((v - weight).abs().max()) for v in (values, right))
    instead = f" instead of {least:.3f}" if wrong[shape] else ""
    print(f"{list(shape)} in blocks of {block}: {wrong[shape]:.1%} of the values differ from code * scale, largest error {error:.3f}{instead}")
    if shape == (40, 192):
        state.shape = torch.Size((1, weight.numel()))
        as_one_row = bool(torch.equal(dequantize_4bit(packed, state).view(shape), right))
print("as one row [40, 192]", "has no wrong value" if as_one_row else "has wrong values too")
sys.exit(not (wrong[40, 128] == 0 and wrong[40, 192] > 0.5 and wrong[40, 96] > 0.5 and as_one_row))
PYTHON
venv/bin/python finding.py
