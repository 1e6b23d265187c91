"""Shared by the grouped formats: groups along the last axis, and checks of weights, scales and group sizes."""

from __future__ import annotations

import torch

from .errors import FormatError

__all__ = ["check_group_size", "check_scales", "check_weight", "grouped", "steps_of"]


def grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., K] as [..., K/G, G], a view."""
    return x.unflatten(-1, (-1, group_size))


def check_group_size(n: int, group_size: int, offered: tuple[int, ...]) -> None:
    """Refuse a group size that the format does not have or that does not divide `n`, the length of the reduction axis."""
    if group_size not in offered:
        raise FormatError(f"the group size must be one of {', '.join(map(str, sorted(offered)))}; found {group_size}")
    if n % group_size:
        raise FormatError(f"the group size must divide the reduction axis; found group size {group_size} and {n} elements")


def check_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in float32. Refuse a weight with a NaN or infinite value."""
    wide = weight.float()
    if not torch.isfinite(wide).all():
        bad = wide[~torch.isfinite(wide)][0].item()
        raise FormatError(f"weights must be finite; found {bad}. The checkpoint is damaged: fetch it again")
    return wide


def check_scales(scales: torch.Tensor) -> None:
    """Refuse `scales` (or offsets) with an infinite value: the range of its group is too wide for their dtype."""
    if scales.numel() and torch.isinf(scales).any():
        dtype, largest = str(scales.dtype).removeprefix("torch."), f"{torch.finfo(scales.dtype).max:.5g}"
        raise FormatError(
            f"a group's scale must stay below {largest}, {dtype}'s largest value; found a wider range. Is this a DBRX checkpoint?"
        )


def steps_of(scales: torch.Tensor) -> torch.Tensor:
    """float32 divisors: the scales, or 1 where a scale is 0 because the group's range is zero or too small for float16."""
    steps = scales.float()
    return torch.where(steps == 0, 1.0, steps)
