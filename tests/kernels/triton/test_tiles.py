"""Tile choices are pure functions: tiles fit the chip, measured tiles take precedence, and candidates can be listed."""

from __future__ import annotations

import pytest

from dbrx_q.kernels.triton import tiles
from dbrx_q.kernels.triton.launch import CHIPS, Chip
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, Problem, Tiles, candidates, choose, trying, use_measured

PROBLEMS = [
    Problem(op, tokens, N, K, bits, group, parallel, unit)
    for op, N, K, parallel in (("linear", 8192, 6144, 1), ("gate_up", 10752, 6144, 4), ("down", 6144, 10752, 4))
    for tokens in (1, 8, 16, 17, 4096)
    for bits, group, unit in ((4, 64, 1), (8, 64, 1), (2, 1, 128), (4, 1, 128))
]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_choices_and_candidates_can_be_run(problem: Problem, chip: Chip) -> None:
    offered = candidates(problem, chip)
    assert offered[0] == choose(problem, chip)
    assert len(set(offered)) == len(offered) > 5
    for choice in offered:
        assert choice.tokens >= chip.smallest_dot
        assert not problem.decode or choice.tokens >= problem.tokens
        assert choice.depth % problem.group == 0
        assert choice.rows % problem.row_unit == 0
        assert choice.splits == 1 or problem.decode
        assert choice.splits * choice.depth <= problem.K
        for size in (choice.rows, choice.tokens, choice.depth, choice.warps):
            assert size & (size - 1) == 0


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
