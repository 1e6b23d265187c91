#!/usr/bin/env bash
# Chips with AVX512_BF16 replace bfloat16's subnormal numbers by zero, in some operations of a program and not in others.
#
# The instructions that convert float32 to bfloat16 (VCVTNEPS2BF16) and that multiply bfloat16 (VDPBF16PS) take subnormal inputs
# for zero and give zero for subnormal results, whatever the processor's flags say. torch's conversion and its elementwise
# product keep such values; its matrix product and bitsandbytes' dequantization to bfloat16 do not. A comparison bit for
# bit must leave out magnitudes below 2^-126. On a chip without AVX512_BF16 the script says so and tries nothing.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   torch 2.13.0+cpu bitsandbytes 0.50.2
#   torch, conversion: 2^-130 becomes 7.35e-40
#   torch, elementwise product with 1: 2^-130 becomes 7.35e-40
#   torch, matrix product with the identity: 2^-130 becomes 0
#   bitsandbytes, NF4 to float32: 2^-130 becomes 7.35e-40
#   bitsandbytes, NF4 to bfloat16: 2^-130 becomes 0
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

print("torch", torch.__version__, "bitsandbytes", version("bitsandbytes"))
if "avx512_bf16" not in open("/proc/cpuinfo").read():
    print("this chip has no AVX512_BF16: not tried")
    sys.exit(0)
tiny = torch.full((64, 64), 2.0**-130)
half = tiny.to(torch.bfloat16)
codes, state = quantize_4bit(torch.ones(64, 64), blocksize=64, quant_type="nf4")
state.absmax.fill_(2.0**-130)
wide = dequantize_4bit(codes, state).clone()
state.dtype = torch.bfloat16
kept = {
    "torch, conversion": half,
    "torch, elementwise product with 1": half * torch.ones_like(half),
    "torch, matrix product with the identity": torch.eye(64, dtype=torch.bfloat16) @ half,
    "bitsandbytes, NF4 to float32": wide,
    "bitsandbytes, NF4 to bfloat16": dequantize_4bit(codes, state),
}
for name, values in kept.items():
    print(f"{name}: 2^-130 becomes {values[0, 0].item():.3g}")
sys.exit([bool((values != 0).all()) for values in kept.values()] != [True, True, False, True, False])
PYTHON
venv/bin/python finding.py
