"""`add_norm` in Triton: one program per token, which reads it once.

Dimension letters: `T` tokens, `D` d_model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent_launch import prefetch_vector, start_next, wait_for_previous
from .launch import chip_of, launch

__all__ = ["add_norm", "add_norm_kernel", "mean_and_variance", "norm_warps", "normed_value"]

# 6144 elements over 8 warps are 24 a thread: three loads of 16 bytes, all in flight before the first sum.
_ELEMENTS_PER_WARP = 1024
_MOST_WARPS = 8


def add_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dbrx_q.kernels.norm.add_norm`."""
    chip_of(x.device)
    T, D = x.shape
    normed = torch.empty(T, D, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty(T, D, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(D)
    launch(
        add_norm_kernel,
        (T,),
        x.contiguous(),
        x if delta is None else delta.contiguous(),
        weight.contiguous(),
        total,
        normed,
        eps,
        D=D,
        BLOCK=block,
        ADD=delta is not None,
        warps=norm_warps(block),
        stages=1,
    )
    return total, normed


def norm_warps(block: int) -> int:
    """Warps of a program that reads `block` elements of a token."""
    return min(_MOST_WARPS, max(1, block // _ELEMENTS_PER_WARP))


@triton.jit(do_not_specialize=["eps"])
def add_norm_kernel(
    x,  # [T, D]
    delta,  # [T, D]
    weight,  # [D]
    total,  # [T, D]
    normed,  # [T, D]
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    prefetch_vector(weight, D, PDL)
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    place = tl.program_id(0).to(tl.int64) * D + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + more).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean, variance = mean_and_variance(value, inside, D)
    tl.store(normed + place, normed_value(value, inside, mean, variance, scale, eps).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def mean_and_variance(value, inside, D: tl.constexpr):
    """Of a token's float32 [BLOCK], whose elements outside D are zeros."""
    mean = tl.sum(value, axis=0) / D
    centered = tl.where(inside, value - mean, 0.0)
    return mean, tl.sum(centered * centered, axis=0) / D


@triton.jit
def normed_value(value, inside, mean, variance, scale, eps):
    """The norm of some elements of a token, float32."""
    return tl.where(inside, value - mean, 0.0) * tl.rsqrt(variance + eps) * scale
