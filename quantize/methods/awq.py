"""AWQ's scales (Lin et al. 2023) for the columns of an expert's w2, folded into the rows of its v1 at no cost and without loss.

An expert computes w2 @ (silu(w1 x) * (v1 x)), so dividing row f of v1 by s[f] and multiplying column f of w2 by s[f] leaves the output
unchanged. Each group of v1 is within a row: only its scale changes, and no code. In w2 a larger column gets a smaller share of the rounding
error.

Dimension letters: `N` rows of w2, `K` its reduction axis, which is the rows of v1 [K, D].
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.formats.registry import TensorFormat

from .grid import searched_grid

__all__ = ["column_error", "column_scales", "fold_v1", "fold_w2"]

_POWERS = [step / 10 for step in range(11)]
# Keeps float16 scales of v1 and w2 out of its subnormal and infinite ends: DBRX's are between 2^-12 and 2^-5.
_MOST = 16.0
_SAMPLE_ROWS = 256  # rows on which powers are compared


def column_scales(weight: torch.Tensor, importance: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """float32 [K], all positive: the column scales with the least error after quantization; ones if no scales reduce it.

    The candidates are importance^(a / 2) for a = 0, 0.1 .. 1 (Lin et al. 2023, "AWQ", equation 5, with the root mean square for the mean
    magnitude), normalised so that the largest is the inverse of the smallest and none is above 16. `column_error` compares them on up to
    256 rows.

    Args:
        weight: [N, K], w2 of an expert.
        importance: float32 [K], at least 0: the mean square of each input.
        fmt: a format with a uniform grid.

    Raises:
        FormatError: the group size is not offered or does not divide K, or a range is too wide for float16 scales.
    """
    rows = weight[:: -(-len(weight) // _SAMPLE_ROWS)].float()
    best, least = torch.ones_like(importance), float("inf")
    for power in _POWERS:
        scales = _normalised(importance, power)
        error = column_error(rows, importance, fmt, scales)
        if error < least:
            best, least = scales, error
    return best


def column_error(weight: torch.Tensor, importance: torch.Tensor, fmt: TensorFormat, scales: torch.Tensor) -> float:
    """Sum of importance * (value / scales - weight)^2, where the values are weight * scales, rounded in searched ranges.

    Args:
        weight: [N, K].
        importance: float32 [K].
        fmt: a format with a uniform grid.
        scales: float32 [K].

    Raises:
        FormatError: as for `column_scales`.
    """
    wide = weight.float() * scales
    column_importance = importance / scales.square()
    grid = searched_grid(wide, fmt, column_importance)
    return float(((grid.dequantize(grid.round(wide)) - wide).square() * column_importance).sum(dtype=torch.float64))


def fold_v1(v1: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [K, D]: v1 [K, D] with each row divided by its scale, float32 [K]; with `fold_w2` and any w1 the same expert."""
    return v1.float() / scales[:, None]


def fold_w2(w2: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: w2 [N, K] with each column multiplied by its scale, float32 [K]."""
    return w2.float() * scales


def _normalised(importance: torch.Tensor, power: float) -> torch.Tensor:
    """importance^(power / 2) within [1/16, 16], the largest times the smallest being 1."""
    largest = importance.max()
    if power == 0 or largest <= 0:
        return torch.ones_like(importance)
    least = max(_MOST ** (-4 / power), torch.finfo(torch.float32).tiny)
    scales = (importance / largest).clamp(min=least).pow(power / 2)
    return scales / (scales.max() * scales.min()).sqrt()
