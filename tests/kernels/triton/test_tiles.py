"""Tile choices are pure functions: tiles fit the chip, measured tiles take precedence, and candidates can be listed."""

from __future__ import annotations

import pytest

from dbrx_q.eval.bench.kernel_shapes import empty_weight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton import tiles
from dbrx_q.kernels.triton.batch_dot import run_groups
from dbrx_q.kernels.triton.launch import CHIPS, Chip
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, Problem, Tiles, candidates, choose, trying, use_measured

PROBLEMS = [
    Problem(op, tokens, N, K, bits, group, parallel, unit)
    for op, N, K, parallel in (("linear", 8192, 6144, 1), ("gate_up", 10752, 6144, 4), ("down", 6144, 10752, 4))
    for tokens in (1, 8, 16, 17, 4096)
    for bits, group, unit in ((4, 64, 1), (8, 64, 1), (2, 1, 128), (4, 1, 128))
]
RUNS = [
    Problem("linear", tokens, N, 6144, bits, group, run_groups=groups)
    for N in (1024, 8192, 100352)
    for bits, group, groups, most in ((4, 32, 4, 4), (4, 64, 2, 8), (4, 128, 1, 16), (8, 32, 2, 8), (8, 64, 1, 16), (8, 128, 1, 16))
    for tokens in (1, most)
]
"""Products of `batch_dot`."""
SPANS = [
    Problem(op, tokens, N, K, 4, group, parallel, run_groups=groups)
    for op, N, K, parallel in (("gate_up", 10752, 6144, 4), ("down", 6144, 10752, 4), ("down", 512, 1024, 16))
    for group, groups, most in ((32, 2, 8), (64, 1, 16), (128, 1, 16))
    for tokens in (1, most)
]
"""Products of `group_dot`."""


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@pytest.mark.parametrize("problem", PROBLEMS + RUNS + SPANS, ids=str)
def test_choices_and_candidates_can_be_run(problem: Problem, chip: Chip) -> None:
    offered = candidates(problem, chip)
    assert offered[0] == choose(problem, chip)
    assert len(set(offered)) == len(offered) > 5
    for choice in offered:
        assert choice.tokens * max(1, problem.run_groups) >= chip.smallest_dot
        assert not problem.decode or choice.tokens >= problem.tokens
        assert choice.depth % problem.group == 0
        assert choice.rows % problem.row_unit == 0
        runs = choice.warps if problem.op == "linear" else 1  # each warp of `batch_dot` has runs of its own
        assert choice.depth >= problem.group * problem.run_groups * runs
        assert choice.splits == 1 or problem.decode
        assert choice.splits * choice.depth <= problem.K
        for size in (choice.rows, choice.tokens, choice.depth, choice.warps):
            assert size & (size - 1) == 0


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.vendor == "cuda"], ids=lambda chip: chip.name)
@pytest.mark.parametrize("N", [6144, 8192], ids=["out_proj", "Wqkv"])
@pytest.mark.parametrize(("bits", "groups"), [(4, 2), (8, 1)], ids=["int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_all_programs_of_a_projection_run_at_once_and_loop_over_several_steps(
    chip: Chip, N: int, bits: int, groups: int, tokens: int
) -> None:
    problem = Problem("linear", tokens, N, 6144, bits, 64, run_groups=groups)
    choice = choose(problem, chip)
    assert N // choice.rows * choice.splits <= chip.multiprocessors * tiles._resident(problem, choice, chip)
    assert 6144 // (choice.depth * choice.splits) >= 6


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.vendor == "cuda"], ids=lambda chip: chip.name)
def test_runs_serve_int4_where_the_matrix_units_have_time_for_zero_points(chip: Chip) -> None:
    assert (run_groups(empty_weight(TensorFormat("int4", 64), 64, 128), 1, chip) > 0) == (chip.name != "sm_86")
    assert run_groups(empty_weight(TensorFormat("int8", 64), 64, 128), 1, chip) > 0


def test_the_decode_regime_ends_at_matvec_tokens() -> None:
    assert Problem("linear", MATVEC_TOKENS, 64, 64, 4, 64).decode
    assert not Problem("linear", MATVEC_TOKENS + 1, 64, 64, 4, 64).decode


def test_a_measured_choice_applies_to_its_bucket_and_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MEASURED", {})
    chip, fast = CHIPS["sm_86"], Tiles(16, 8, 128, 2, 1, 5)
    measured = Problem("gate_up", 4, 10752, 6144, 4, 64, 16)
    use_measured({("sm_86", measured): fast})
    assert choose(measured, chip) == fast
    assert choose(Problem("gate_up", 3, 10752, 6144, 4, 64, 12), chip) == fast  # 3 tokens have 12 active experts, 4 have 16
    assert choose(Problem("gate_up", 2, 10752, 6144, 4, 64, 8), chip) != fast
    assert choose(measured, CHIPS["sm_90"]) != fast
    assert tiles.measured() == {("sm_86", measured): fast}


@pytest.mark.parametrize("before", [None, Tiles(32, 8, 128, 1, 2, 2)], ids=["default", "measured"])
def test_trying_restores_the_earlier_choice(before: Tiles | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MEASURED", {})
    problem, chip, tried = PROBLEMS[0], CHIPS["sm_86"], Tiles(16, 8, 128, 2, 1, 5)
    if before is not None:
        use_measured({("sm_86", problem): before})
    earlier = choose(problem, chip)
    with trying(problem, chip, tried):
        assert choose(problem, chip) == tried
    assert choose(problem, chip) == earlier
