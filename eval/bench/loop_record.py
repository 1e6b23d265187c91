"""How many instructions the loops of the usual launches have on two chips: a file that the tests hold the kernels to.

A change that adds an instruction to an inner loop makes decoding slower without failing any other test. So the tests compare exact counts,
by the Triton version that the file names, and a change of the counts changes the file too.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TypedDict

from dbrx_q.errors import RequestError
from dbrx_q.eval.report_folder import write_files
from dbrx_q.kernels.triton.launch import CHIPS, Launch

from .kernel_resources import compile_launch
from .kernel_shapes import loop_key, usual_launches
from .sass import Pipe, parse, pipes, product_loops
from .static_cases import STEP, record, static_cases

__all__ = ["RECORDED_TRELLIS", "LoopRecord", "change", "count_loops", "read_record", "recorded_cases", "write_record"]

RECORDED_TRELLIS = {"sm_86": "trellis2", "sm_90": "trellis3"}
"""The chips, and the trellis format of each: `tests/kernels/ahead_of_time` compiles these launches anyway."""


class LoopRecord(TypedDict):
    """The file."""

    triton: str
    """Version that compiled the kernels."""
    loops: dict[str, dict[str, list[list[int]]]]
    """By chip and case, for each loop with matrix instructions in order: [instructions, ALU instructions among them]."""


@cache
def recorded_cases(chip: str) -> dict[str, Launch]:
    """The launches with such loops by case and kernel; of those that share a loop, the one that the tests compile."""
    compiled = {loop_key(launch): launch for _, launch in usual_launches(CHIPS[chip])}
    cases = {}
    for case in static_cases():
        if case.op in (STEP, "small") or ("trellis" in case.name and f"{RECORDED_TRELLIS[chip]}," not in case.name):
            continue
        for launch, _ in record(case, chip):
            kernel = launch.kernel.__name__.removesuffix("_kernel")
            if kernel not in ("combine", "rotate"):
                cases[f"{case.name}: {kernel}"] = compiled.get(loop_key(launch), launch)
    return cases


def count_loops(chip: str, case: str) -> list[list[int]]:
    """[instructions, ALU instructions] of each loop of a case."""
    loops = product_loops(parse(compile_launch(recorded_cases(chip)[case], CHIPS[chip]).sass))
    return [[len(loop.instructions), pipes(loop.instructions)[Pipe.ALU]] for loop in loops]


def change(recorded: list[list[int]] | None, counted: list[list[int]]) -> str | None:
    """What differs from the record and what to do about it; None if nothing does."""
    if recorded == counted:
        return None
    before, after = (" + ".join(f"{total} (ALU {alu})" for total, alu in loops) for loops in (recorded or [], counted))
    advice = "run `.venv/bin/dbrx-q bench static --record tests/kernels/ahead_of_time/loop_instructions.json`"
    if recorded is None:
        return f"a case must be recorded; found none for {after} instructions. To record it {advice}"
    if any(sum(added) > sum(held) for added, held in zip(zip(*counted, strict=True), zip(*recorded, strict=True), strict=False)):
        return (
            f"a loop must have no more instructions than recorded, {before}; found {after}. "
            f"Shorten it, or {advice} and state the increase in the commit message"
        )
    return f"the record must hold the instructions of a loop, {before}; found {after}. To keep the gain {advice}"


def read_record(path: Path) -> LoopRecord:
    """The file that `write_record` wrote."""
    contents: LoopRecord = json.loads(path.read_text(encoding="utf-8"))
    return contents


def write_record(path: Path) -> None:
    """Count the loops of every recorded case and write the file, whole or not at all.

    Raises:
        RequestError: the folder of the file does not exist.
    """
    import triton

    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder of --record must exist; found none. Create it or name another file")
    loops = {chip: {case: count_loops(chip, case) for case in recorded_cases(chip)} for chip in RECORDED_TRELLIS}
    lines = []
    for chip, cases in loops.items():
        rows = ",\n".join(f"      {json.dumps(case)}: {json.dumps(counts)}" for case, counts in cases.items())
        lines.append(f"    {json.dumps(chip)}: {{\n{rows}\n    }}")
    body = ",\n".join(lines)
    text = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "loops": {{\n{body}\n  }}\n}}\n'
    write_files(path.parent, {path.name: text.encode()})
