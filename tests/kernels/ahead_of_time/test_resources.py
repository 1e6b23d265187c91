"""Every kernel that the tile choices can return at DBRX's shapes, compiled for every chip.

In bfloat16 with the default formats (groups of 64) on every chip; NF4 and other group sizes, which the same code decodes, on sm_86 alone.
`dbrx-q bench resources` compiles everything for every chip.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import dbrx_q.kernels.launch as launch_module
from dbrx_q.eval.kernel_report import Row, problems
from dbrx_q.eval.kernel_resources import compile_launch, global_loads, packed_parameters
from dbrx_q.eval.kernel_shapes import FORMATS, dbrx_launches
from dbrx_q.kernels.launch import CHIPS, Launch

DEFAULT = tuple(fmt for fmt in FORMATS if fmt.group == 64 and fmt.name != "nf4")
OTHERS_ON = ("sm_86",)
CHIPS_TESTED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100")


@cache
def launches(chip: str) -> dict[str, Launch]:
    formats = FORMATS if chip in OTHERS_ON else DEFAULT
    found = dbrx_launches(CHIPS[chip], formats=formats)
    return {f"{chip} {case} {launch.kernel.__name__} {number}": launch for number, (case, launch) in enumerate(found)}


@pytest.mark.parametrize(("chip", "case"), [pytest.param(chip, case, id=case) for chip in CHIPS_TESTED for case in launches(chip)])
def test_compiles_within_the_chip(chip: str, case: str) -> None:
    launch = launches(chip)[case]
    compiled = compile_launch(launch, CHIPS[chip])
    assert problems(Row(case, compiled), CHIPS[chip]) == []
    if CHIPS[chip].vendor == "cuda":
        loads = global_loads(compiled.assembly)
        # Nothing is overlooked: each load is traced to one parameter, and packed data is read at all.
        assert len(loads) == compiled.assembly.count("ld.global") + compiled.assembly.count("cp.async.c") - compiled.assembly.count(
            "cp.async.commit"
        )
        assert -1 not in {place for place, _ in loads}
        assert compiled.packed_loads == ((16,) if packed_parameters(launch) else ())
    else:
        assert "scratch_load" not in compiled.assembly
        assert "scratch_store" not in compiled.assembly


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
