"""Finds the fastest tiles on this device, by measuring the candidates for every product of a DBRX model.

Dimension letters: `T` tokens, `E` experts, `A` active experts, `D` d_model, `F` ffn hidden, `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dbrx_q.errors import DbrxError
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton.batch_dot import run_groups
from dbrx_q.kernels.triton.group_dot import span_groups
from dbrx_q.kernels.triton.launch import CHIPS, Chip, chip_of
from dbrx_q.kernels.triton.linear import problem_of
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, Problem, Tiles, candidates, trying
from dbrx_q.kernels.triton.weights import bits_of, group_of, row_unit_of
from dbrx_q.model.tuned_tiles import TileChoice, Tuning

from .device_timing import Environment, copies, environment, random_weight, turns
from .kernel_shapes import DBRX, FORMATS, Shapes, empty_weight

__all__ = [
    "DEFAULT_FORMATS",
    "DeviceTimer",
    "Failure",
    "Timer",
    "dbrx_problems",
    "differences",
    "problem_calls",
    "sweep",
    "tune",
    "tuning_of",
]

DEFAULT_FORMATS = (TensorFormat("int4", 64), TensorFormat("int8", 64), *(TensorFormat.of(f"trellis{bits}") for bits in (2, 3, 4)))
"""Formats to tune. Experts in NF4 in groups of 64 use the tiles of int4 in prefill, and a trellis format those of its bits, whatever its
code and rotation."""
_TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
_REPEATS = 5
_CLOSE = 2**-5  # of the largest value: tiles change only the order of sums, a wrong kernel changes much more

Timer = Callable[[Problem, Tiles], float]
"""Measures the seconds that a problem takes with given tiles; may raise any error."""


@dataclass(frozen=True)
class Failure:
    """A candidate that could not be measured."""

    problem: Problem
    """That it was a candidate for."""
    tiles: Tiles
    """The candidate."""
    reason: str
    """The error, in one line."""


def dbrx_problems(chip: Chip, formats: Sequence[TensorFormat] = DEFAULT_FORMATS, shapes: Shapes = DBRX) -> list[Problem]:
    """Every product of a DBRX layer and of the head on `chip`, for powers of two of tokens."""
    E, A, D, F = shapes.experts, shapes.active, shapes.width, shapes.hidden
    problems = []
    for fmt in formats:
        bits, group, unit = _distinguished(fmt)
        for T in _TOKENS:
            problems += [problem_of(empty_weight(fmt, N, D), T, chip) for N in (shapes.qkv, D, shapes.vocabulary)]
            tokens = T if T <= MATVEC_TOKENS else T * A
            parallel = min(E, tokens * A)
            of_experts = bits, group, parallel, unit, span_groups((empty_weight(fmt, 128, 128),), tokens, chip)
            problems += [Problem("gate_up", tokens, F, D, *of_experts), Problem("down", tokens, D, F, *of_experts)]
    return problems


def _distinguished(fmt: TensorFormat) -> tuple[int, int, int]:
    """(bits, group, row unit), by which problems tell formats apart but for their run groups; those that share all four share tiles."""
    weight = empty_weight(fmt, 128, 128)
    return bits_of(weight), group_of(weight), row_unit_of(weight)


def _serves(fmt: TensorFormat, problem: Problem) -> bool:
    """Whether the problem is a product with weights in `fmt`, on any chip."""
    weight, tokens = empty_weight(fmt, 128, 128), problem.tokens
    of_linear = problem.op == "linear"
    groups = {run_groups(weight, tokens, chip) if of_linear else span_groups((weight,), tokens, chip) for chip in CHIPS.values()}
    return _distinguished(fmt) == (problem.bits, problem.group, problem.row_unit) and problem.run_groups in groups


def sweep(
    problems: Sequence[Problem],
    chip: Chip,
    timer: Timer,
    *,
    thorough: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    over: Callable[[], bool] = lambda: False,
) -> tuple[list[TileChoice], list[Failure]]:
    """Measure candidates: (the fastest of each problem, candidates that failed). A problem whose default tiles fail has no choice.

    Args:
        problems: to tune.
        chip: determines the candidates.
        timer: measures one candidate.
        thorough: whether to measure every candidate; otherwise only those that differ from the best so far in one respect, until none is
            faster.
        report: called with (done, total).
        over: whether the time is up; then the best of what was measured is chosen.
    """
    choices: list[TileChoice] = []
    failures: list[Failure] = []
    for done, problem in enumerate(problems):
        report(done, len(problems))
        untried = candidates(problem, chip)
        best = default = untried[0]
        times: dict[Tiles, float] = {}
        while tried := [tiles for tiles in untried if thorough or differences(tiles, best) <= 1]:
            untried = [tiles for tiles in untried if tiles not in tried]
            for tiles in tried:
                if over() and default in times:
                    break
                try:
                    times[tiles] = timer(problem, tiles)
                except Exception as error:  # the compiler and the driver raise many kinds of errors
                    failures.append(Failure(problem, tiles, f"{type(error).__name__}: {str(error)[:200]}"))
            if default not in times:
                break
            best = min(times, key=lambda tiles: times[tiles])
            if over():
                break
        if default in times:
            choices.append(TileChoice(problem, best, times[best], times[default], len(times)))
    report(len(problems), len(problems))
    return choices, failures


def differences(tiles: Tiles, other: Tiles) -> int:
    """In how many respects two tiles differ; rows and warps, which divide the work of a program together, count as one."""
    pairs = zip(_respects(tiles), _respects(other), strict=True)
    return sum(a != b for a, b in pairs)


def _respects(tiles: Tiles) -> tuple[object, ...]:
    return (tiles.rows, tiles.warps), tiles.tokens, tiles.depth, tiles.splits, tiles.stages


def tune(
    device: torch.device,
    formats: Sequence[TensorFormat] = DEFAULT_FORMATS,
    *,
    thorough: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tuning, list[Failure]]:
    """Run `sweep` over DBRX's problems on `device`; `formats` are those of `dbrx_problems`, the other arguments those of `sweep`.

    Raises:
        DbrxError: no tiles could be measured.
    """
    chip = chip_of(device)
    choices, failures = sweep(dbrx_problems(chip, formats), chip, DeviceTimer(device), thorough=thorough, report=report)
    if not choices:
        raise DbrxError(f"no tiles could be measured on {chip.name}; the first failure: {failures[0].reason if failures else 'none'}")
    return tuning_of(environment(device), choices), failures


def tuning_of(measured_on: Environment, choices: Sequence[TileChoice]) -> Tuning:
    """What a file of measured tiles holds."""
    return Tuning(
        measured_on.chip,
        measured_on.multiprocessors,
        measured_on.device,
        measured_on.date,
        measured_on.versions,
        tuple(choices),
    )


class DeviceTimer:
    """Times a problem's op on random weights, and compares each candidate's result with the result of the first one."""

    def __init__(self, device: torch.device, shapes: Shapes = DBRX) -> None:
        self._device, self._shapes, self._chip = device, shapes, chip_of(device)
        self._problem: Problem | None = None
        self._calls: list[Callable[[], torch.Tensor]] = []
        self._expected: torch.Tensor | None = None

    def __call__(self, problem: Problem, tiles: Tiles) -> float:
        """Median seconds of one call.

        Raises:
            DbrxError: the result differs from the result of the first tiles measured for this problem.
        """
        if problem != self._problem:
            self._calls, self._expected = [], None  # frees their memory first
            self._calls, self._problem = problem_calls(problem, self._device, self._shapes), problem
        with trying(problem, self._chip, tiles):
            out = self._calls[0]().float()
            if self._expected is None:
                self._expected = out
            elif not (out - self._expected).abs().max() <= _CLOSE * self._expected.abs().max():  # also if the result is NaN
                raise DbrxError(f"{tiles} must give the same result for {problem} as other tiles; the results differ. Report this as a bug")
            return turns({"": self._calls}, repeats=_REPEATS)[""].seconds


def problem_calls(problem: Problem, device: torch.device, shapes: Shapes = DBRX) -> list[Callable[[], torch.Tensor]]:
    """Calls of a problem's op on random weights: several on different weights, where those fit the L2 cache.

    Args:
        problem: one of `dbrx_problems(shapes=shapes)`.
        device: of the weights; "meta" to record launches.
        shapes: of the model.
    """
    fmt = next(fmt for fmt in FORMATS if _serves(fmt, problem))
    torch.manual_seed(0)
    random = partial(random_weight, fmt, device=device)
    if problem.op == "linear":
        x = torch.randn(problem.tokens, problem.K, dtype=torch.bfloat16, device=device)
        count = copies(problem.N * problem.K * problem.bits // 8, device)
        return [partial(linear, x, random(problem.N, problem.K), backend=Backend.TRITON) for _ in range(count)]
    E, A, D, F = shapes.experts, shapes.active, shapes.width, shapes.hidden
    T = problem.tokens if problem.decode else problem.tokens // A
    layer = ExpertWeights(random(E, F, D), random(E, F, D), random(E, D, F))
    x = torch.randn(T, D, dtype=torch.bfloat16, device=device)
    experts = torch.rand(T, E, device=device).argsort(-1)[:, :A].contiguous()
    weights = torch.full((T, A), 1 / A, device=device)
    return [partial(moe_experts, x, experts, weights, layer, backend=Backend.TRITON)]
