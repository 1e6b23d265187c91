"""`linear` in Triton: one kernel for few and for many tokens; for few, the reduction is split over programs.

Dimension letters: `T` tokens, `N` output features, `K` input features; letters of tiles as in `triton/weights.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.weights import Weight

from .arrival import arrive, counters
from .batch_dot import batch_dot, run_groups
from .dependent_launch import prefetch_weight, start_next, wait_for_previous
from .launch import Chip, chip_of, launch
from .tiles import Problem, choose
from .trellis import rotated, rotation_of
from .weights import bits_of, constants_of, dot_step, group_of, pointers_of, row_unit_of, scaled

__all__ = ["linear", "linear_kernel", "problem_of"]

_TOKEN_TILES_TOGETHER = tl.constexpr(8)


def linear(x: torch.Tensor, weight: Weight, clip: float | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """y [T, N] in the dtype of `x` [T, K]; see `dbrx_q.kernels.linear.linear`."""
    (T, K), N = x.shape, weight.shape[0]
    weight = weight if isinstance(weight, torch.Tensor) else weight.contiguous()
    y = torch.empty(T, N, dtype=x.dtype, device=x.device)
    chip = chip_of(x.device)
    problem = problem_of(weight, T, chip)
    tiles = choose(problem, chip)
    grid = triton.cdiv(T, tiles.tokens) * triton.cdiv(N, tiles.rows), tiles.splits
    partial, arrived = y, y
    if tiles.splits > 1:
        partial = torch.empty(grid[0] * tiles.splits * tiles.rows * tiles.tokens, dtype=torch.float32, device=x.device)
        arrived = counters(x.device, grid[0])
    launch(
        linear_kernel,
        grid,
        rotated(x.contiguous(), rotation_of(weight)),
        *pointers_of(weight, x.dtype),
        y if residual is None else residual.contiguous(),
        y,
        partial,
        arrived,
        0.0 if clip is None else clip,
        T,
        N,
        K=K,
        BN=tiles.rows,
        BT=tiles.tokens,
        BK=tiles.depth,
        SPLITS=tiles.splits,
        G=problem.run_groups,
        CLIP=clip is not None,
        RESIDUAL=residual is not None,
        warps=tiles.warps,
        stages=tiles.stages,
        **constants_of(weight, chip, tiles.warps),
    )
    return y


def problem_of(weight: Weight, tokens: int, chip: Chip) -> Problem:
    """The product that tiles are chosen for."""
    N, K = weight.shape
    unit, groups = row_unit_of(weight), run_groups(weight, tokens, chip)
    return Problem("linear", tokens, N, K, bits_of(weight), group_of(weight), row_unit=unit, run_groups=groups)


@triton.jit(do_not_specialize=["T", "clip"])
def linear_kernel(
    x,  # [T, K]
    q,  # weight [N, K]
    s,
    z,
    residual,  # [T, N]
    y,  # [T, N]
    partial,  # float32 [programs of the first axis, SPLITS, BN, BT]
    arrived,  # int32 [programs of the first axis], zeros
    clip,
    T,
    N,
    K: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    CLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    WARPGROUP: tl.constexpr,
    CODE: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    program = tl.program_id(0)
    split = 0 if G > 0 and SPLITS == 1 else tl.program_id(1)  # a constant makes the prefill of NF4 spill 8 bytes on sm_86
    if G > 0:  # a tile holds all tokens: the first loads wait for no division
        rows, tokens = program * BN + tl.arange(0, BN), tl.arange(0, BT)
    else:
        # Programs that share rows of the weight or tokens run close in time, so that both stay in the L2 cache.
        tiles_n, tiles_t = tl.cdiv(N, BN), tl.cdiv(T, BT)
        together = _TOKEN_TILES_TOGETHER * tiles_n
        first_t = program // together * _TOKEN_TILES_TOGETHER
        tiles_together = min(tiles_t - first_t, _TOKEN_TILES_TOGETHER)
        rows = program % together // tiles_together * BN + tl.arange(0, BN)
        tokens = (first_t + program % together % tiles_together) * BT + tl.arange(0, BT)

    steps: tl.constexpr = (K + BK - 1) // BK
    steps_per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    prefetch_weight(q, s, rows, split * steps_per_split * BK, steps_per_split * BK, N, K, FORMAT, GROUP, PDL and BT <= 16)
    wait_for_previous(PDL)
    first = split * steps_per_split
    end = min(first + steps_per_split, steps)
    if G > 0:
        acc = batch_dot(x, q, s, z, rows, tokens, first, end, T, N, K, BK, FORMAT, GROUP, G, FAST)
    else:
        acc = tl.zeros((BN, BT), tl.float32)
        for step in range(first, end):
            k = step * BK
            columns = k + tl.arange(0, BK)
            inside = (tokens < T)[:, None] & (columns < K)[None, :]
            tile = tl.load(x + tokens[:, None].to(tl.int64) * K + columns[None, :], mask=inside, other=0.0)
            acc = dot_step(acc, tile, q, s, z, rows, k, N, K, BK, FORMAT, GROUP, STRIDE_N, STRIDE_K, FAST, WARPGROUP, CODE)

    if SPLITS > 1:
        place = tl.arange(0, BN)[:, None] * BT + tl.arange(0, BT)[None, :]
        mine = partial + program.to(tl.int64) * SPLITS * BN * BT + place
        written = (tokens < T)[None, :]
        tl.store(mine + split * BN * BT, acc, mask=written)
        if not arrive(arrived + program, SPLITS - 1):
            return
        acc = tl.zeros((BN, BT), tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(mine + other * BN * BT, mask=written, other=0.0, cache_modifier=".cg")
    acc = scaled(acc, s, rows, N, FORMAT)
    if CLIP:
        acc = tl.clamp(acc, -clip, clip, tl.PropagateNan.ALL)
    place = tokens[None, :].to(tl.int64) * N + rows[:, None]
    inside = (rows < N)[:, None] & (tokens < T)[None, :]
    if RESIDUAL:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
