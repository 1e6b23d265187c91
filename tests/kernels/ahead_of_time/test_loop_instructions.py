"""No inner loop of the usual launches gets longer unnoticed: its instructions are those of loop_instructions.json.

`dbrx-q bench static --record tests/kernels/ahead_of_time/loop_instructions.json` writes that file anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from dbrx_q.eval.bench.loop_record import RECORDED_TRELLIS, change, count_loops, read_record, recorded_cases

RECORD = read_record(Path(__file__).with_name("loop_instructions.json"))
CASES = [(chip, case) for chip in RECORDED_TRELLIS for case in recorded_cases(chip)]


@pytest.mark.skipif(
    triton.__version__ != RECORD["triton"],
    reason=f"instructions are recorded as Triton {RECORD['triton']} compiles them, not {triton.__version__}",
)
@pytest.mark.parametrize(("chip", "case"), CASES, ids=[f"{chip} {case}" for chip, case in CASES])
def test_a_loop_has_the_instructions_of_the_record(chip: str, case: str) -> None:
    message = change(RECORD["loops"][chip].get(case), count_loops(chip, case))
    assert message is None, f"{chip}, {case}: {message}"


def test_the_record_has_no_case_that_is_gone() -> None:
    assert {(chip, case) for chip, cases in RECORD["loops"].items() for case in cases} <= set(CASES)
