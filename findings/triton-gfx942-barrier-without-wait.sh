#!/usr/bin/env bash
# On AMD's gfx942 (MI300X) tl.debug_barrier() does not wait for the stores before it: a program can announce sums that are not stored yet.
#
# A usual way to add up partial sums: every program stores its part, its threads meet at tl.debug_barrier(), one atomic_add with
# sem="acq_rel" counts the program, and the last program reads all parts. Compiled for gfx1100 or for NVIDIA, each wavefront waits
# for its stores at the barrier. For gfx942 LLVM leaves that wait out, since the chip may keep memory operations in flight across
# barriers ("back-off barrier"); the release of the atomic waits for the stores of the one wavefront that performs it. Those of
# the others may still be on their way when the program is counted. The option llvm_fn_attrs="target-features=-back-off-barrier",
# which Triton 3.9 has and 3.6 has not, brings the wait back. Nothing is run here: the compiler's assembly is read.
#
# Seen on 2026-11-29 (Python 3.11.7, Linux, no GPU):
#   triton 3.9.0
#   gfx1100: buffer_store_b32, then s_waitcnt_vscnt null, 0x0, then s_barrier
#   gfx942: buffer_store_dword, then no wait, then s_barrier
#   gfx942 with -back-off-barrier: buffer_store_dword, then s_waitcnt vmcnt(0), then s_barrier
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_up(x, parts, counter, out, PROGRAMS: tl.constexpr):
    i = tl.arange(0, 1024)
    tl.store(parts + tl.program_id(0) * 1024 + i, tl.load(x + tl.program_id(0) * 1024 + i) * 2)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PROGRAMS - 1:
        total = tl.zeros((1024,), tl.float32)
        for p in range(PROGRAMS):
            total += tl.load(parts + p * 1024 + i, cache_modifier=".cg")
        tl.store(out + i, total)


def barrier_waits(chip, **options):
    """Whether each wavefront waits for its stores between the first store and the first barrier after it."""
    signature = {"x": "*fp32", "parts": "*fp32", "counter": "*i32", "out": "*fp32", "PROGRAMS": "constexpr"}
    target = GPUTarget("hip", chip, 64 if chip == "gfx942" else 32)
    source = ASTSource(add_up, signature, {"PROGRAMS": 8}, {})
    lines = [line.split(";")[0].strip() for line in triton.compile(source, target=target, options=options | {"enable_fp_fusion": True}).asm["amdgcn"].splitlines()]
    store = next(n for n, line in enumerate(lines) if re.match("(global|buffer)_store", line))
    barrier = next(n for n, line in enumerate(lines) if line == "s_barrier" and n > store)
    waits = [line for line in lines[store:barrier] if re.match(r"s_waitcnt(_vscnt null, 0x0|.*vmcnt\(0\))", line)]
    name = f"{chip} with -back-off-barrier" if options else chip
    print(f"{name}: {lines[store].split()[0]}, then {', '.join(waits) or 'no wait'}, then s_barrier")
    return bool(waits)


print("triton", triton.__version__)
off = {"llvm_fn_attrs": "target-features=-back-off-barrier"}
sys.exit((barrier_waits("gfx1100"), barrier_waits("gfx942"), barrier_waits("gfx942", **off)) != (True, False, True))
PYTHON
venv/bin/python finding.py
