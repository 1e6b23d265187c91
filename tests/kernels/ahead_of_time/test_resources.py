"""Every kernel that the tile choices can return at DBRX's shapes, compiled for a chip of each kind.

In bfloat16 with int4 and int8 weights in groups of 64 and every KV format on each; NF4 and experts that are not packed on sm_86 only.
Of kernels that differ only before and after their main loop, the one with the most there. `dbrx-q bench resources --all` compiles
everything, for every chip and in other group sizes too, and fails by the same rules.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import dbrx_q.kernels.triton.launch as launch_module
from dbrx_q.eval.bench.kernel_report import ResourceRow, problems
from dbrx_q.eval.bench.kernel_resources import compile_launch, global_loads, packed_parameters
from dbrx_q.eval.bench.kernel_shapes import usual_launches
from dbrx_q.kernels.triton.launch import CHIPS, Launch

WRITE_ONLY = ("qkv_kernel",)  # stores codes of the KV cache and reads none
# What compiles for sm_86 does for sm_89, which has as much memory and more instructions, and sm_80 has more memory: `bench resources` takes
# them all.
CHIPS_TESTED = ("sm_86", "sm_90", "sm_120", "gfx1100")


@cache
def launches(chip: str) -> dict[str, Launch]:
    found = usual_launches(CHIPS[chip])
    return {f"{chip} {case} {launch.kernel.__name__} {number}": launch for number, (case, launch) in enumerate(found)}


@pytest.mark.parametrize(("chip", "case"), [pytest.param(chip, case, id=case) for chip in CHIPS_TESTED for case in launches(chip)])
def test_compiles_within_the_chip(chip: str, case: str) -> None:
    launch = launches(chip)[case]
    compiled = compile_launch(launch, CHIPS[chip])
    assert problems(ResourceRow(case, compiled), CHIPS[chip]) == []
    if CHIPS[chip].vendor == "cuda":
        loads = global_loads(compiled.assembly)
        # Nothing is overlooked: each load is traced to one parameter, and packed data is read at all.
        assert len(loads) == compiled.assembly.count("ld.global") + compiled.assembly.count("cp.async.c") - compiled.assembly.count(
            "cp.async.commit"
        )
        assert all(places for places, _ in loads)
        reads = packed_parameters(launch) and launch.kernel.__name__ not in WRITE_ONLY
        assert compiled.packed_loads == ((16,) if reads else ())


def kernels_in_the_sources() -> set[str]:
    """Names of the functions that stand first in a call of `launch`."""
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
def test_no_kernel_is_without_a_row(chip: str) -> None:
    assert kernels_in_the_sources() == {launch.kernel.__name__ for launch in launches(chip).values()}
