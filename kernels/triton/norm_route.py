"""`norm_route` in Triton: the norm before the router and the router, in one kernel, for few tokens.

The programs that share a token's product with the router each read the whole token and compute its mean and variance, which costs less than
another launch: 12 KB come from the L2 cache. Each then normalizes the elements that it multiplies.

Bits are those of `add_norm` and `route` one after the other: statistics are sums of the same block by as many warps, and products are
summed in the same tiles and splits.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model; of tiles as in `router.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arrival import counters
from .dependent_launch import prefetch_plain, prefetch_vector, start_next, wait_for_previous
from .launch import chip_of, launch
from .norm import mean_and_variance, normed_value
from .router import choose, norm_of, router_tiles, store_share, sum_of_shares
from .tiles import MATVEC_TOKENS

__all__ = ["norm_route", "norm_route_kernel"]


def norm_route(
    x: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor, top_k: int, norm_order: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed, logits, experts, weights) of `dbrx_q.kernels.router.norm_route`, for T up to `tiles.MATVEC_TOKENS`."""
    chip_of(x.device)
    (T, D), E = x.shape, router.shape[0]
    assert T <= MATVEC_TOKENS
    normed = torch.empty(T, D, dtype=x.dtype, device=x.device)
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    experts = torch.empty(T, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=x.device)
    tiles = router_tiles(T, D, E)
    BE, block = triton.next_power_of_2(E), triton.next_power_of_2(D)
    partial, arrived = logits, experts
    if tiles.splits > 1:
        partial = torch.empty(T * tiles.splits * BE, dtype=torch.float32, device=x.device)
        arrived = counters(x.device, T)
    launch(
        norm_route_kernel,
        (T, tiles.splits),
        x.contiguous(),
        weight.contiguous(),
        normed,
        router.contiguous(),
        logits,
        experts,
        weights,
        partial,
        arrived,
        eps,
        1.0 if norm_order is None else float(norm_order),
        T,
        D=D,
        E=E,
        A=top_k,
        BLOCK=block,
        BE=BE,
        BD=tiles.depth,
        SPLITS=tiles.splits,
        NORM=norm_of(norm_order),
        warps=tiles.warps,
        stages=1,
    )
    return normed, logits, experts, weights


@triton.jit(do_not_specialize=["eps", "order", "T"])
def norm_route_kernel(
    x,  # [T, D]
    weight,  # [D]
    normed,  # [T, D]
    router,  # [E, D]
    logits,  # float32 [T, E]
    experts,  # int64 [T, A]
    weights,  # float32 [T, A]
    partial,  # float32 [T, SPLITS, BE]
    arrived,  # int32 [T], zeros
    eps,
    order,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    token, split = tl.program_id(0), tl.program_id(1)
    experts_here = tl.arange(0, BE)
    steps: tl.constexpr = (D + BD - 1) // BD
    steps_per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    prefetch_vector(weight, D, PDL)
    prefetch_plain(router, experts_here, split * steps_per_split * BD, steps_per_split * BD, E, D, PDL)
    wait_for_previous(PDL)

    row = x + token.to(tl.int64) * D
    whole = tl.arange(0, BLOCK)
    mean, variance = mean_and_variance(tl.load(row + whole, mask=whole < D, other=0.0).to(tl.float32), whole < D, D)

    acc = tl.zeros((1, BE, BD), tl.float32)
    for step in range(split * steps_per_split, min(split * steps_per_split + steps_per_split, steps)):
        columns = step * BD + tl.arange(0, BD)
        inside = columns < D
        value = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tile = normed_value(value, inside, mean, variance, scale, eps).to(normed.dtype.element_ty)
        tl.store(normed + token.to(tl.int64) * D + columns, tile, mask=inside)
        w_place = experts_here[None, :, None].to(tl.int64) * D + columns[None, None, :]
        w = tl.load(router + w_place, mask=(experts_here < E)[None, :, None] & inside[None, None, :], other=0.0)
        acc += tile.to(tl.float32)[None, None, :] * w.to(tl.float32)
    logit = tl.sum(acc, axis=2)  # [1, BE]

    if SPLITS > 1:
        if not store_share(logit, partial, arrived, token, split, SPLITS, 1, BE):
            return
        logit = sum_of_shares(partial, token, SPLITS, 1, BE)
    choose(logit, token + tl.arange(0, 1), T, logits, experts, weights, order, E, A, 1, BE, NORM)
