"""Sequences of several sources: their proportions, what is held out, and the requests that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch

from dbrx_q.errors import RequestError
from dbrx_q.quantize.calibration.sequences import sequences_of
from dbrx_q.quantize.calibration.sources import CalibrationSequences, CalibrationSource, CalibrationWarning, draw

S = 10


def source(number: int, weight: float = 1.0, windows: int = 100) -> CalibrationSource:
    """Its token ids are number * 10000 and up, so that a sequence says which window of which source it is."""
    return CalibrationSource(f"s{number}", weight, range(number * 10_000, number * 10_000 + windows * S + 3))


def drawn(*sources: CalibrationSource, count: int = 48, seed: int = 5) -> CalibrationSequences:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return draw(sources, count=count, length=S, seed=seed)


def starts(sequences: torch.Tensor) -> list[int]:
    return [int(row[0]) for row in sequences]


def check(sequences: CalibrationSequences, sources: Sequence[CalibrationSource]) -> None:
    """Whole windows, of the right sources, none of them twice."""
    assert sequences.names == tuple(source.name for source in sources)
    assert sum(sequences.weights) == pytest.approx(1)
    for ids, counts, spans in (
        (sequences.ids, sequences.counts, sequences.spans),
        (sequences.held_out, sequences.held_out_counts, sequences.held_out_spans),
    ):
        assert ids.shape == (sum(counts), S)
        assert (ids.diff() == 1).all()
        for number, (count, span) in enumerate(zip(counts, spans, strict=True)):
            first = starts(ids[span])
            assert len(first) == count
            assert first == sorted(first)
            assert all(start // 10_000 == number and start % 10_000 % S == 0 for start in first)
    everything = starts(sequences.ids) + starts(sequences.held_out)
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("weights", "windows", "count", "counts", "held_out"),
    [
        ((1,), (100,), 48, (48,), (3,)),
        ((1,), (100,), 99, (99,), (1,)),  # a source alone calibrates first
        ((1,), (20,), 48, (20,), (0,)),
        ((3, 1), (100, 100), 48, (36, 12), (2, 2)),
        ((1, 1, 1), (500, 500, 500), 256, (86, 85, 85), (5, 5, 5)),
        ((5, 3, 1), (300, 300, 300), 10, (6, 3, 1), (2, 2, 2)),  # 5.56, 3.33 and 1.11: the largest remainder rounds up
        ((1000, 1, 1), (500, 500, 500), 100, (98, 1, 1), (6, 2, 2)),  # one sequence at least
        ((2, 2, 0.001, 0.001), (100,) * 4, 9, (4, 3, 1, 1), (2,) * 4),
        ((1, 1), (10, 300), 64, (8, 56), (2, 2)),  # what the first lacks, the second gives
        ((1, 1), (8, 8), 64, (6, 6), (2, 2)),
        ((1, 1), (7, 100), 64, (6, 58), (1, 2)),
        ((1, 1), (3, 100), 64, (3, 61), (0, 2)),
        ((2, 0), (100, 100), 64, (64, 0), (4, 4)),  # a source of weight 0 is only measured
        ((1, 1, 0), (100, 100, 3), 64, (32, 32, 0), (2, 2, 3)),
        ((0.001, 0.001), (100, 100), 48, (24, 24), (2, 2)),
    ],
)
def test_counts_follow_the_weights(
    weights: list[float], windows: list[int], count: int, counts: tuple[int, ...], held_out: tuple[int, ...]
) -> None:
    sources = [source(n, weight, size) for n, (weight, size) in enumerate(zip(weights, windows, strict=True))]
    sequences = drawn(*sources, count=count)
    check(sequences, sources)
    assert (sequences.counts, sequences.held_out_counts) == (counts, held_out)


@pytest.mark.parametrize("windows", [5, 48, 51, 200])
def test_one_source_gives_the_windows_that_it_gave_alone(windows: int) -> None:
    text = source(0, 0.3, windows)
    expected = sequences_of(text.ids, count=48, length=S, seed=5)
    for sources in ([text], [text, source(1, 0)]):
        assert torch.equal(drawn(*sources).ids, expected)


def test_the_draw_depends_on_the_seed_alone() -> None:
    sources = source(0, 2), source(1)
    first, again, other = drawn(*sources), drawn(*sources), drawn(*sources, seed=6)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.ids, other.ids)
    assert not torch.equal(first.held_out, other.held_out)


def test_ready_sequences_are_drawn_whole() -> None:
    ready = torch.arange(10_000, 10_400).view(40, S)
    sequences = drawn(source(0), CalibrationSource("s1", 1.0, ready))
    assert sequences.counts == (24, 24)
    check(sequences, [source(0), source(1)])


def test_every_beginning_of_the_interleaved_sequences_has_all_sources() -> None:
    sequences = drawn(source(0, 3), source(1, 1))
    ids, numbers = sequences.interleaved
    owners = [start // 10_000 for start in starts(ids)]
    assert owners == numbers
    assert sorted(starts(ids)) == sorted(starts(sequences.ids))
    for n in (4, 12, 40):
        assert owners[:n].count(1) == n // 4
    alone = drawn(source(0))
    assert torch.equal(alone.interleaved[0], alone.ids)
    assert alone.interleaved[1] == [0] * len(alone.ids)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([source(0), source(1, windows=10)], "s1: 8 sequences calibrate where its weight asks for 24; it has 10 windows, and the other"),
        ([source(0, windows=20)], "s0: 20 sequences calibrate where its weight asks for 48; .* and 20 sequences calibrate in all"),
        ([source(0, 50), source(1, 1, 7)], r"s1: 1 sequence\(s\) of its 7 are held out"),
        ([source(0, 50), source(1, 1, 3)], r"s1: no sequence\(s\) of its 3 are held out"),
    ],
)  # fmt: skip
def test_small_sources_are_noticed(sources: list[CalibrationSource], message: str) -> None:
    with pytest.warns(CalibrationWarning, match=message):
        draw(sources, count=48, length=S, seed=0)


@pytest.mark.parametrize(
    ("sources", "count", "message"),
    [
        ([source(0), source(1, -0.5)], 48, "s1: the weight of a calibration source must be a finite number, 0 or more; found -0.5"),
        ([source(0, float("nan"))], 48, "s0: the weight .* found nan"),
        ([source(0, float("inf"))], 48, "s0: the weight .* found inf"),
        ([source(0, 0), source(1, 0)], 48, "at least one source of positive weight; found 2 of weight 0"),
        ([], 48, "at least one source of positive weight; found 0"),
        ([source(0), source(1), source(0)], 48, "must be given once; found s0 twice"),
        ([source(0), source(1), source(2)], 2, r"found 3 sources for 2 sequence\(s\)"),
        ([source(0), source(1, windows=0)], 48, "s1: .* at least one sequence of 10 tokens; found 3"),
        ([source(0), source(1, 0, windows=0)], 48, "s1: .* at least one sequence of 10 tokens; found 3"),
        ([CalibrationSource("self", 1, torch.zeros(3, 9).long())], 3, "self: its sequences must have 10 tokens; found 3 sequences of 9"),
        ([source(0)], 0, "at least 1 sequence of at least 2 tokens; found 0 of 10"),
    ],
)  # fmt: skip
def test_refused_draws(sources: list[CalibrationSource], count: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        draw(sources, count=count, length=S, seed=0)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_refused_seeds(seed: int) -> None:
    with pytest.raises(RequestError, match=r"the seed of a calibration must be from 0 to 2\^63 - 1"):
        draw([source(0)], count=4, length=S, seed=seed)
