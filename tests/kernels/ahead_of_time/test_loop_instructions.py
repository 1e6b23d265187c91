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


def test_the_record_is_of_the_version_that_is_tested() -> None:
    """Otherwise every test above is skipped."""
    constraints = (Path(__file__).parents[3] / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={RECORD['triton']} " in constraints, (
        "write the record with `.venv/bin/dbrx-q`, which has the Triton of .ci/constraints.txt"
    )


@pytest.mark.parametrize("counted", [[[101, 50]], [[100, 51]], [[100, 50], [10, 1]], [[90, 60]]])
def test_more_instructions_must_be_stated(counted: list[list[int]]) -> None:
    message = change([[100, 50]], counted)
    assert message is not None
    assert "state the increase in the commit message" in message


def test_fewer_instructions_are_recorded() -> None:
    assert "To keep the gain" in (change([[100, 50]], [[99, 50]]) or "")
    assert "a case must be recorded" in (change(None, [[99, 50]]) or "")
    assert change([[100, 50]], [[100, 50]]) is None


def test_the_record_has_no_case_that_is_gone() -> None:
    assert {(chip, case) for chip, cases in RECORD["loops"].items() for case in cases} <= set(CASES)
