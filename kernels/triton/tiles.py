"""Tile choices of the Triton kernels: pure functions of shape, format and chip, overridden by the tiles that a sweep measured on a device.

Dimension letters: `T` tokens, `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from dbrx_q.kernels.formats.cache_folders import warn_once

from .launch import Chip, refused_kernel

__all__ = [
    "MATVEC_TOKENS",
    "RUN_BYTES",
    "Problem",
    "Tiles",
    "candidates",
    "changes",
    "choose",
    "measured",
    "refused_op",
    "trying",
    "use_measured",
    "without_measured",
]

MATVEC_TOKENS = 16
"""Most tokens that the matrix-vector regime takes."""

RUN_BYTES = 64
"""Least bytes of a run of `batch_dot`: shorter loads would need more requests to the L2 cache than it takes at the memory's full speed."""


@dataclass(frozen=True)
class Problem:
    """The product that tiles are chosen for."""

    op: str
    """ "linear", "gate_up" or "down"."""
    tokens: int
    """T of `linear`; for the others the tokens of a decode step, or the pairs of a token and an expert in prefill."""
    N: int
    """Rows of the weight (of one expert)."""
    K: int
    """Its columns."""
    bits: int
    """Bits of a stored code; 16 for a plain weight."""
    group: int
    """Elements that share a scale; 1 for a plain weight."""
    parallel: int = 1
    """Matrices that are multiplied at the same time, the active experts of a decode step; 1 for `linear`."""
    row_unit: int = 1
    """Rows that can only be dequantized together: 128 in a trellis format."""
    run_groups: int = 0
    """Groups in one product of `batch_dot` (`linear`) or `group_dot` (experts); 0 where every weight is scaled."""

    @property
    def decode(self) -> bool:
        """Whether the matrix-vector regime is used."""
        return self.tokens <= MATVEC_TOKENS


@dataclass(frozen=True)
class Tiles:
    """The work of one program."""

    rows: int
    """Rows of the weight."""
    tokens: int
    """Tokens."""
    depth: int
    """Elements along the reduction axis per step."""
    splits: int
    """Programs that share a reduction."""
    warps: int
    """Warps of the program."""
    stages: int
    """Stages of the pipeline that loads tiles."""


_MEASURED: dict[tuple[str, Problem], Tiles] = {}

_changes = 0  # of what `choose` answers

_REFUSED: ContextVar[str] = ContextVar("refused", default="")  # the op whose measured tiles `choose` drops
_TRIED: ContextVar[bool] = ContextVar("tried", default=False)  # within `trying`


def use_measured(choices: Mapping[tuple[str, Problem], Tiles]) -> None:
    """Prefer `choices`, by (chip name, problem), to the defaults from now on.

    Tokens and parallel matrices of a problem are rounded up to powers of two, there and in `choose`.
    """
    _MEASURED.update({(chip, _rounded(problem)): tiles for (chip, problem), tiles in choices.items()})
    _changed()


def changes() -> int:
    """A number that grows whenever `choose` may answer differently than before."""
    return _changes


def measured() -> Mapping[tuple[str, Problem], Tiles]:
    """All choices that `use_measured` was given so far."""
    return dict(_MEASURED)


@contextmanager
def trying(problem: Problem, chip: Chip, tiles: Tiles) -> Iterator[None]:
    """Make `choose` return `tiles` for the problem."""
    key = chip.name, _rounded(problem)
    before = _MEASURED.get(key)
    _MEASURED[key] = tiles
    _changed()
    token = _TRIED.set(True)
    try:
        yield
    finally:
        _TRIED.reset(token)
        if before is None:
            del _MEASURED[key]
        else:
            _MEASURED[key] = before
        _changed()


def choose(problem: Problem, chip: Chip) -> Tiles:
    """The measured tiles of a problem, or the default if none were measured."""
    key = chip.name, _rounded(problem)
    tiles = _MEASURED.get(key)
    if tiles is not None and _REFUSED.get() == problem.op:
        del _MEASURED[key]
        _changed()
        warn_once(
            f"{chip.name}: the measured {tiles} of {problem} need more than the chip has; the default tiles are used. "
            "Run `dbrx-q bench tune` again"
        )
        tiles = None
    return tiles or _default(problem, chip)


def refused_op(error: Exception) -> str:
    """The op of the kernel that could not be launched because it needs more shared memory or threads than the chip has.

    Raises:
        Exception: `error`, if it is another one, or if the tiles are those of `trying`.
    """
    kernel = refused_kernel(error)
    op = next((op for op in ("linear", "gate_up", "down") if kernel.startswith(f"{op}_")), "")
    if not op or _TRIED.get():
        raise error
    return op


@contextmanager
def without_measured(op: str) -> Iterator[None]:
    """Drop the measured tiles of every problem of `op` that `choose` is asked for within; their defaults are used from then on."""
    token = _REFUSED.set(op)
    try:
        yield
    finally:
        _REFUSED.reset(token)


def candidates(problem: Problem, chip: Chip) -> list[Tiles]:
    """Tiles worth measuring for a problem; the default is first."""
    default = _default(problem, chip)
    tilings = [default]
    run = problem.group * problem.run_groups
    tokens = {default.tokens} if problem.decode else {default.tokens, 64, 128, 256}
    for rows, warps in _rows_and_warps(problem):
        runs = run and problem.op == "linear"
        depths = (run * warps, run * warps * 2) if runs else (128, 256) if problem.decode else (64, 128)
        for depth in sorted({max(depth, problem.group) for depth in depths}):
            for token in sorted(tokens):
                for stages in (2, 3, 4, 5):
                    for splits in sorted({1, 2, 4, 8, default.splits}) if problem.decode else (1,):
                        tiles = Tiles(rows, token, depth, splits, warps, stages)
                        if tiles not in tilings and splits * depth <= problem.K and _shared_memory(problem, tiles) <= chip.shared_memory:
                            tilings.append(tiles)
    return tilings


def _rows_and_warps(problem: Problem) -> tuple[tuple[int, int], ...]:
    if problem.row_unit > 1:
        return (problem.row_unit, 4), (problem.row_unit, 8)
    if problem.run_groups:
        return ((16, 4), (16, 8), (32, 2), (32, 4), (32, 8), (64, 4)) if problem.op == "linear" else ((32, 1), (64, 1), (32, 2), (64, 2))
    return ((16, 1), (32, 2), (64, 4), (32, 1), (64, 2)) if problem.decode else ((64, 4), (128, 4), (128, 8))


def _default(problem: Problem, chip: Chip) -> Tiles:
    if problem.row_unit > 1:
        return _streams(problem, chip)
    if problem.run_groups:
        return _runs(problem, chip) if problem.op == "linear" else _spans(problem, chip)
    return _matvec(problem, chip) if problem.decode else _matmul(problem, chip)


def _matvec(problem: Problem, chip: Chip) -> Tiles:
    """Tiles with enough programs to keep every load unit busy; the reduction is split if the rows alone do not give enough."""
    tokens = max(chip.smallest_dot, _power_of_two(problem.tokens))
    # Four warps make Triton take Hopper's warpgroup instructions, whose operand layout reads packed bytes two at a time: 5.3 instead of
    # 4.6 instructions per weight (counted in the compiled loop of int4 [.., 6144], group 64).
    # With two matrices in one program, fewer rows leave registers for more programs; 32 rows over four warps dequantize each weight twice.
    rows, warps = (32, 2) if chip.name == "sm_90" or problem.op == "gate_up" else (64, 4)
    # On AMD a deeper tile spills in int8 (212 bytes a thread) and takes LLVM many seconds to compile. For experts, tiles 128 deep take 128
    # registers instead of 168 (int4, one token); with more stages, groups of 32 spill.
    deep = problem.op == "linear" and problem.bits == 4
    depth = max(problem.group, 64 if chip.vendor == "hip" else 256 if deep else 128)
    stages = 4 if problem.op != "linear" and problem.bits == 4 and problem.group > 32 else 3
    resident = chip.multiprocessors * (8 if warps == 2 else 4)
    programs = -(-problem.N // rows) * problem.parallel
    steps = -(-problem.K // depth)
    splits = 1
    while splits < 16 and programs * splits < resident and steps >= 4 * splits and problem.op != "gate_up":
        splits *= 2
    return Tiles(rows, tokens, depth, splits, warps, stages)


def _runs(problem: Problem, chip: Chip) -> Tiles:
    """Tiles of runs, one or two a warp and step, such that all programs run at once where they can, the whole reduction in each.

    A multiprocessor with few programs needs many warps in each: on an H200 a quarter of the issue slots is spare.
    """
    run = problem.group * problem.run_groups
    tokens = max(chip.smallest_dot // problem.run_groups, _power_of_two(problem.tokens))
    for rows, warps in ((32, 8), (16, 4)):
        tiles = Tiles(rows, tokens, 8 * run, 1, warps, 3)
        programs = -(-problem.N // rows)
        most = -(-programs // chip.multiprocessors)  # programs of one multiprocessor
        balanced = programs >= 0.9 * most * chip.multiprocessors
        if balanced and most <= _resident(problem, tiles, chip) and tiles.depth <= problem.K:
            return tiles
    programs, splits, depth = -(-problem.N // 32), 1, 4 * run
    while programs * splits < 1.5 * chip.multiprocessors and -(-problem.K // depth) >= 4 * splits and splits < 16:
        splits *= 2
    # With a third stage and 16 columns, int4 spills 8 bytes on sm_80.
    three = tokens * problem.run_groups <= 8 or chip.name == "sm_90"
    for stages in (3, 2) if three else (2,):
        tiles = Tiles(32, tokens, depth, splits, 4, stages)
        if programs * splits <= chip.multiprocessors * _resident(problem, tiles, chip):
            return tiles
    return Tiles(64, tokens, depth, 1, 4, 3 if three and chip.shared_memory > 128 * 1024 else 2)


def _resident(problem: Problem, tiles: Tiles, chip: Chip) -> int:
    """Programs of `batch_dot` that a multiprocessor runs at once, by registers (counted in int4 in groups of 64) and by shared memory."""
    columns = tiles.tokens * problem.run_groups
    single = tiles.depth == tiles.warps * problem.group * problem.run_groups  # run of each warp
    registers = 128 if single and columns <= 8 and tiles.rows <= 32 else 168
    memory = (tiles.rows * problem.bits // 8 + columns * 2) * tiles.depth * (tiles.stages - 1)
    return min(65536 // (registers * 32 * tiles.warps), chip.shared_memory // (memory + 2048))


def _spans(problem: Problem, chip: Chip) -> Tiles:
    """Tiles of one warp, which uses the activations of a step for four tiles of matrix instructions and waits for no other warp.

    Counted in int4 in groups of 64, up to 8 tokens: 64 to 72 instructions of a thread for each 16 packed bytes. Half of the rows take 80. A
    step of 256 elements takes 60, but with its shared memory the programs of one token would not run at once on an H200.
    """
    rows, depth = 32 if problem.op == "gate_up" else 64, max(128, problem.group)
    programs, splits = -(-problem.N // rows) * problem.parallel, 1
    while problem.op != "gate_up" and programs * splits * 2 <= 12 * chip.multiprocessors and problem.K >= 8 * depth * splits:
        splits *= 2
    tokens = max(chip.smallest_dot // problem.run_groups, _power_of_two(problem.tokens))
    return Tiles(rows, tokens, depth, splits, 1, 4 if problem.op == "gate_up" else 3)


def _streams(problem: Problem, chip: Chip) -> Tiles:
    """Tiles of whole streams, which hold `row_unit` rows of an input."""
    rows, depth = problem.row_unit, 64
    # Four warps load 16 bytes a thread of a tile 64 deep, and its levels pass through 16 KB of shared memory. The sums of 64 tokens with
    # both matrices of `gate_up` fill the registers. On AMD they spill with four warps.
    warps = 8 if chip.vendor == "hip" and problem.op == "gate_up" else 4
    if not problem.decode:
        return Tiles(rows, 32 if problem.op == "gate_up" else 64, depth, 1, warps, 2)
    splits, programs = 1, -(-problem.N // rows) * problem.parallel
    while splits < 16 and problem.op != "gate_up" and programs * splits < 4 * chip.multiprocessors and problem.K >= 4 * depth * splits:
        splits *= 2
    # With a third stage, sums of several tokens spill 8 bytes in `down` on sm_86 and in `linear` on sm_120.
    stages = 2 if problem.op != "gate_up" and problem.tokens > 1 else 3
    return Tiles(rows, max(chip.smallest_dot, _power_of_two(problem.tokens)), depth, splits, warps, stages)


def _matmul(problem: Problem, chip: Chip) -> Tiles:
    depth = max(64, problem.group)
    wide = chip.shared_memory > 128 * 1024
    if problem.op != "linear":
        return _grouped(problem, chip, depth)
    tokens = min(128 if wide else 64, max(32, _power_of_two(problem.tokens)))
    if chip.vendor == "hip":  # four warps spill in int8
        return Tiles(64, tokens, depth, 1, 8, 2)
    return Tiles(128 if wide else 64, tokens, depth, 1, 8 if wide else 4, 3)  # with 2 stages, int8 spills


def _grouped(problem: Problem, chip: Chip, depth: int) -> Tiles:
    """Tiles by the tokens of an average expert: with few, reading weights bounds the speed; with many, arithmetic does."""
    if chip.vendor == "hip":  # larger tiles, or fewer warps, spill in int8
        return Tiles(32, 32, depth, 1, 4, 2) if problem.op == "gate_up" else Tiles(64, 64, depth, 1, 8, 2)
    tokens = _power_of_two(problem.tokens // problem.parallel * 5 // 4)
    if tokens <= 32:
        # A tile of both matrices, 128 deep, does not fit the registers with 32 tokens.
        deep = tokens <= 16 or problem.op == "down"
        tiles = Tiles(32, max(16, tokens), max(128, problem.group) if deep else depth, 1, 2, 3 if deep else 4)
    elif chip.name == "sm_90" and tokens >= 128 and depth == 64:
        # Counted in the compiled loop of int4, group 64: 338 instructions of each of 8 warps feed 1024 cycles of the tensor cores; with
        # 256 tokens of one matrix, 272, and the products overlap with dequantizing (`moe_prefill` makes one tile of gate and up).
        tiles = Tiles(128, 256 if problem.op == "down" and tokens >= 256 else 128, depth, 1, 8, 4)
    else:
        tiles = Tiles(32 if problem.op == "gate_up" and depth > 64 else 64, 64, depth, 1, 4, 3)
    while _shared_memory(problem, tiles) * 9 // 8 > chip.shared_memory and tiles.stages > 2:
        tiles = replace(tiles, stages=tiles.stages - 1)
    return tiles


def _shared_memory(problem: Problem, tiles: Tiles) -> int:
    """Bytes of shared memory that the pipeline keeps: packed rows and 16-bit activations of every stage."""
    weights = tiles.rows * tiles.depth * problem.bits // 8 * (2 if problem.op == "gate_up" else 1)
    return (weights + tiles.tokens * max(1, problem.run_groups) * tiles.depth * 2) * tiles.stages


def _rounded(problem: Problem) -> Problem:
    return replace(problem, tokens=_power_of_two(problem.tokens), parallel=_power_of_two(problem.parallel))


def _changed() -> None:
    global _changes  # one number for the process
    _changes += 1


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
