"""`route` in Triton: products, softmax, top k and normalisation in one kernel.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model; of tiles `BT` tokens, `BE` experts (a power of
two), `BD` elements along D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .arrival import arrive, counters
from .dependent_launch import start_next, wait_for_previous
from .launch import chip_of, launch
from .norm import norm_warps
from .tiles import MATVEC_TOKENS

__all__ = ["RouterTiles", "choose", "norm_of", "route", "route_kernel", "router_tiles", "store_share", "sum_of_shares"]

_PLAIN_NORM = tl.constexpr(0)
_SUM_NORM = tl.constexpr(1)
_MOST_NORM = tl.constexpr(2)
_POWER_NORM = tl.constexpr(3)


@dataclass(frozen=True)
class RouterTiles:
    """The work of one program."""

    tokens: int
    """Tokens."""
    depth: int
    """Elements along D per step."""
    splits: int
    """Programs that share the D of a token."""
    warps: int
    """Warps of the program."""


_TILE = 4096  # products that a program of 4 warps keeps in 32 registers per thread, one of 8 in 16
_STEPS = 2  # steps of one program if D is split: 12 programs per token read DBRX's router
_MOST_SPLITS = 16


@cache
def router_tiles(T: int, D: int, E: int) -> RouterTiles:
    """A decode step waits for the router, so D is split over programs. In prefill, the tokens of a program share the router's loads.

    Programs of one token have as many warps as `norm_route` needs for the norm: sums have the same order in both.
    """
    experts = triton.next_power_of_2(E)
    widest = triton.next_power_of_2(D)
    if T <= MATVEC_TOKENS:
        depth = min(widest, max(16, _TILE // experts))
        return RouterTiles(1, depth, min(_MOST_SPLITS, triton.cdiv(triton.cdiv(D, depth), _STEPS)), norm_warps(widest))
    tokens = 4 if experts <= 64 else 1
    return RouterTiles(tokens, min(widest, max(16, 2 * _TILE // experts // tokens)), 1, 4)


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, norm_order: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, experts, weights) of `dbrx_q.kernels.router.route`."""
    chip_of(x.device)
    (T, D), E = x.shape, router.shape[0]
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    experts = torch.empty(T, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=x.device)
    tiles = router_tiles(T, D, E)
    grid = triton.cdiv(T, tiles.tokens), tiles.splits
    BE = triton.next_power_of_2(E)
    partial, arrived = logits, experts
    if tiles.splits > 1:
        partial = torch.empty(grid[0] * tiles.splits * tiles.tokens * BE, dtype=torch.float32, device=x.device)
        arrived = counters(x.device, grid[0])
    launch(
        route_kernel,
        grid,
        x.contiguous(),
        router.contiguous(),
        logits,
        experts,
        weights,
        partial,
        arrived,
        1.0 if norm_order is None else float(norm_order),
        T,
        D=D,
        E=E,
        A=top_k,
        BT=tiles.tokens,
        BE=BE,
        BD=tiles.depth,
        SPLITS=tiles.splits,
        NORM=norm_of(norm_order),
        warps=tiles.warps,
        stages=1,
    )
    return logits, experts, weights


def norm_of(order: float | None) -> int:
    """Constant NORM of a kernel that routes: how weights are divided."""
    norm = _PLAIN_NORM if order is None else _SUM_NORM if order == 1 else _MOST_NORM if math.isinf(order) else _POWER_NORM
    return int(norm.value)


@triton.jit(do_not_specialize=["order", "T"])
def route_kernel(
    x,  # [T, D]
    router,  # [E, D]
    logits,  # float32 [T, E]
    experts,  # int64 [T, A]
    weights,  # float32 [T, A]
    partial,  # float32 [programs of the first axis, SPLITS, BT, BE]
    arrived,  # int32 [programs of the first axis], zeros
    order,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_previous(PDL)
    program, split = tl.program_id(0), tl.program_id(1)
    tokens, experts_here = program * BT + tl.arange(0, BT), tl.arange(0, BE)

    steps: tl.constexpr = (D + BD - 1) // BD
    steps_per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    acc = tl.zeros((BT, BE, BD), tl.float32)
    for step in range(split * steps_per_split, min(split * steps_per_split + steps_per_split, steps)):
        columns = (step * BD + tl.arange(0, BD))[None, None, :]
        w_place = experts_here[None, :, None].to(tl.int64) * D + columns
        w = tl.load(router + w_place, mask=(experts_here < E)[None, :, None] & (columns < D), other=0.0)  # [1, BE, BD]
        if BT == 1:  # a vector, so that the compiler takes the layout of w for both
            elements = step * BD + tl.arange(0, BD)
            tile = tl.load(x + program.to(tl.int64) * D + elements, mask=elements < D, other=0.0)[None, None, :]
        else:
            x_place = tokens[:, None, None].to(tl.int64) * D + columns
            tile = tl.load(x + x_place, mask=(tokens < T)[:, None, None] & (columns < D), other=0.0)  # [BT, 1, BD]
        acc += tile.to(tl.float32) * w.to(tl.float32)
    logit = tl.sum(acc, axis=2)  # [BT, BE]

    if SPLITS > 1:
        if not store_share(logit, partial, arrived, program, split, SPLITS, BT, BE):
            return
        logit = sum_of_shares(partial, program, SPLITS, BT, BE)
    choose(logit, tokens, T, logits, experts, weights, order, E, A, BT, BE, NORM)


@triton.jit
def store_share(logit, partial, arrived, program, split, SPLITS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """Store the sums [BT, BE] of one split; whether it is the last to arrive."""
    place = tl.arange(0, BT)[:, None] * BE + tl.arange(0, BE)[None, :]
    tl.store(partial + (program.to(tl.int64) * SPLITS + split) * BT * BE + place, logit)
    return arrive(arrived + program, SPLITS - 1)


@triton.jit
def sum_of_shares(partial, program, SPLITS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """The sums [BT, BE] of all splits, added in their order."""
    mine = partial + program.to(tl.int64) * SPLITS * BT * BE + tl.arange(0, BT)[:, None] * BE + tl.arange(0, BE)[None, :]
    total = tl.load(mine, cache_modifier=".cg")
    for other in tl.static_range(1, SPLITS):
        total += tl.load(mine + other * BT * BE, cache_modifier=".cg")
    return total


@triton.jit
def choose(
    logit,  # float32 [BT, BE]
    tokens,  # [BT]
    T,
    logits,
    experts,
    weights,
    order,
    E: tl.constexpr,
    A: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Store the logits, the experts chosen by them and the weights of these."""
    experts_here = tl.arange(0, BE)
    inside = (tokens < T)[:, None] & (experts_here < E)[None, :]
    tl.store(logits + tokens[:, None].to(tl.int64) * E + experts_here[None, :], logit, mask=inside)

    exists = (experts_here < E)[None, :]
    largest = tl.max(tl.where(exists, logit, -float("inf")), axis=1)
    probability = tl.where(exists, tl.exp(logit - largest[:, None]), 0.0)
    probability = probability / tl.sum(probability, axis=1)[:, None]
    rank = _ranks(logit, experts_here, E, A, BE)
    picked = tl.where(rank >= 0, probability, 0.0)
    if NORM == _SUM_NORM:
        picked = picked / tl.sum(picked, axis=1)[:, None]
    elif NORM == _MOST_NORM:
        picked = picked / tl.max(picked, axis=1)[:, None]
    elif NORM == _POWER_NORM:
        # Relative to the largest, so that no power underflows to a norm of zero.
        picked = picked / tl.max(picked, axis=1)[:, None]
        powers = tl.where(picked > 0, tl.exp2(tl.log2(tl.where(picked > 0, picked, 1.0)) * order), picked)
        picked = picked / tl.exp2(tl.log2(tl.sum(powers, axis=1)) / order)[:, None]
    chosen = inside & (rank >= 0)
    place = tokens[:, None].to(tl.int64) * A + rank
    tl.store(experts + place, tl.broadcast_to(experts_here[None, :], (BT, BE)).to(tl.int64), mask=chosen)
    tl.store(weights + place, picked, mask=chosen)


@triton.jit
def _ranks(logit, experts_here, E: tl.constexpr, A: tl.constexpr, BE: tl.constexpr):
    """int32 [BT, BE]: 0 for the best expert of each token to A - 1, -1 for those not chosen.

    A different experts are chosen for any logits: NaN counts as the largest, as in torch.sort, and -0 equals 0.
    """
    least: tl.constexpr = -(2**63)
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    key = tl.where(logit != logit, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # in the order of the floats
    # One number orders the experts: the logit's key in the high bits, then the lower index first in the low bits.
    key = (key.to(tl.int64) << 32) | (BE - 1 - experts_here)[None, :].to(tl.int64)
    key = tl.where((experts_here < E)[None, :], key, least)
    rank = tl.full(logit.shape, -1, tl.int32)
    for place in tl.static_range(A):
        best = key == tl.max(key, axis=1)[:, None]
        rank = tl.where(best, place, rank)
        key = tl.where(best, least, key)
    return rank
