"""Every kernel that the tile choices can return at DBRX's shapes, compiled for a chip of each kind.

Every chip gets bfloat16 activations, int4 weights in groups of 64 and every KV format; all but sm_120 int8; sm_86 and sm_90 a trellis
format; only sm_86 NF4 and plain experts.
Of kernels that differ only before and after their main loop, the longest is compiled. `dbrx-q bench resources --all` compiles
everything, for every chip and in other group sizes too, and applies the same rules.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch

import dbrx_q.kernels.triton.launch as launch_module
from dbrx_q.eval.bench.kernel_report import ResourceRow, problems
from dbrx_q.eval.bench.kernel_resources import compile_launch, global_loads, packed_parameters
from dbrx_q.eval.bench.kernel_shapes import empty_weight, usual_launches
from dbrx_q.eval.bench.loop_record import RECORDED_TRELLIS
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton.launch import CHIPS, Launch

# One stores codes of the KV cache, one the bits of streams; they read none.
WRITE_ONLY = ("qkv_kernel", "viterbi_kernel")
# Kernels that compile for sm_86 compile for sm_89, which has as much memory and more instructions, and for sm_80, which has more memory:
# `bench resources` compiles for all of them.
CHIPS_TESTED = ("sm_86", "sm_90", "sm_120", "gfx1100")
# The kernels of trellis formats differ in few lines. sm_120 has as much memory and as many registers as sm_86, and gets int4 alone.
LEFT_OUT = {"sm_120": ("int8:64", "trellis"), "gfx1100": ("trellis",)}


@cache
def launches(chip: str) -> dict[str, Launch]:
    usual = [
        (case, launch)
        for case, launch in usual_launches(CHIPS[chip])
        if (
            ("trellis" not in case or f"{RECORDED_TRELLIS.get(chip)}:" in case) and not any(part in case for part in LEFT_OUT.get(chip, ()))
        )
        or case.startswith("search trellis2")
        or launch.kernel.__name__ == "rotate_kernel"
    ]
    return {f"{chip} {case} {launch.kernel.__name__} {number}": launch for number, (case, launch) in enumerate(usual)}


@pytest.mark.parametrize(("chip", "case"), [pytest.param(chip, case, id=case) for chip in CHIPS_TESTED for case in launches(chip)])
def test_kernels_compile_within_the_limits_of_the_chip(chip: str, case: str) -> None:
    launch = launches(chip)[case]
    compiled = compile_launch(launch, CHIPS[chip])
    assert problems(ResourceRow(case, compiled), CHIPS[chip]) == []
    if CHIPS[chip].vendor == "cuda":
        loads = global_loads(compiled.assembly)
        # Each load is traced to one parameter, and packed data is read. Lookups of levels are PTX of our own, with addresses of their own.
        plain = compiled.assembly.count("ld.global") - compiled.assembly.count("ld.global.nc.b16 ")
        assert len(loads) == plain + compiled.assembly.count("cp.async.c") - compiled.assembly.count("cp.async.commit")
        assert all(parameters for parameters, _ in loads)
        reads = packed_parameters(launch) and launch.kernel.__name__ not in WRITE_ONLY
        assert compiled.packed_loads == ((16,) if reads else ())


def test_int4_experts_compile_in_float16() -> None:
    """Their PTX is another one than that of bfloat16."""
    chip, E, A, D, F = CHIPS["sm_90"], 4, 2, 1024, 512
    gate, down = empty_weight(TensorFormat("int4", 64), E, F, D), empty_weight(TensorFormat("int4", 64), E, D, F)
    x, experts = torch.empty(1, D, dtype=torch.float16, device="meta"), torch.empty(1, A, dtype=torch.int64, device="meta")
    with launch_module.recording(chip) as recorded:
        moe_experts(x, experts, torch.empty(1, A, device="meta"), ExpertWeights(gate, gate, down), backend=Backend.TRITON)
    assert len(recorded) == 2
    for launch in recorded:
        assert problems(ResourceRow("float16", compile_launch(launch, chip)), chip) == []


def kernels_in_the_sources() -> set[str]:
    """Names of the functions that are the first argument of a call of `launch`."""
    folder = Path(launch_module.__file__).parent
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                first = node.args[0]
                assert isinstance(first, ast.Name), f"{path}:{node.lineno}: launch a kernel by its name"
                names.add(first.id)
    return names


@pytest.mark.parametrize("chip", CHIPS_TESTED)
def test_every_kernel_is_compiled(chip: str) -> None:
    assert kernels_in_the_sources() == {launch.kernel.__name__ for launch in launches(chip).values()}
