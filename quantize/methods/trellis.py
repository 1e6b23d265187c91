"""Trellis formats: the search for the streams of a rotated matrix, with the feedback of GPTQ or without, and the scales of its rows.

With moments everything happens in the rotated basis: the matrix is rotated along its inputs (`kernels/formats/rotation.py`) and the
Hessian on both sides (`Moments.rotated`). One input after the other, the largest first, gets the streams of least error, and the inputs
that follow compensate the error, as in `gptq.py`; the streams run along the rows, so this costs the search nothing. Then each row gets
the scale that fits its levels best.

Dimension letters: `N` rows, `K` the reduction axis, `G` inputs that are rotated together.
"""

from __future__ import annotations

from typing import cast

import torch

from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.rotation import rotate
from dbrx_q.kernels.formats.trellis import TrellisWeight, first_scales, fitted_scales, levels_of, pack
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import ROWS
from dbrx_q.kernels.quantize import quantize
from dbrx_q.kernels.trellis import trellis_block

from .moments import Moments

__all__ = ["trellis_gptq", "trellis_nearest"]

_BLOCK = 128  # columns between two updates of all later columns
# Columns grow by the errors that they compensate, so the search wants larger steps: at 2 bits 1.06 and 1.1 times the step take 1.4 % off
# the output error of the bundled model; at 3 and 4 bits, where errors are a quarter and a sixteenth, 1.06 gains nothing.
_GROWTH = 1.28  # times 4^-bits


def trellis_nearest(weight: torch.Tensor, fmt: TensorFormat) -> tuple[TrellisWeight, float, float]:
    """The streams of least squared error, every input by itself, with the scale that fits each row's levels best.

    Args:
        weight: [N, K], finite. Rows of different tiles of 128 are independent of each other.
        fmt: a trellis format.

    Returns:
        The packed weight, its sum of squared errors and the sum of squares of the weight.

    Raises:
        FormatError: a group size that is not offered or does not divide K, or a row too large for float16 scales.
    """
    packed = cast(TrellisWeight, quantize(weight, fmt))
    rotated = rotate(weight, fmt.group_size)
    values = levels_of(packed).float() * packed.scales.float()
    error, square = (float(part.square().sum(dtype=torch.float64)) for part in (values - rotated, rotated))
    return packed, error, square


def trellis_gptq(target: torch.Tensor, fmt: TensorFormat, moments: Moments) -> tuple[TrellisWeight, torch.Tensor]:
    """The packed weight whose values have a small (value - target) H (value - target)^T, and these values, float32 [N, K].

    Frantar et al. 2022, "GPTQ", algorithm 1, with the streams of a column in place of its nearest codes; each row's scale is then
    s = u H t^T / u H u^T for its levels u and target t, so that no row errs more than one of zeros.

    Args:
        target: float32 [N, K], rotated along its inputs. Rows of different tiles of 128 are independent of each other.
        fmt: a trellis format.
        moments: rotated as the target is.

    Raises:
        FormatError: a row too large for float16 scales.
    """
    assert moments.hessian is not None
    code = _code(fmt)
    scales = first_scales(target * (1 + _GROWTH / 4**code.bits), code)
    symbols = _symbols(target, scales, fmt, moments)
    levels = _levels(symbols, scales, fmt)
    scales = fitted_scales(levels, levels @ moments.hessian, target, scales)
    return _packed(symbols, scales, fmt), levels * scales.float()[:, None]


def _symbols(target: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, moments: Moments) -> torch.Tensor:
    """uint8 [tiles, K, 128]: the streams, column by column."""
    (N, K), code = target.shape, _code(fmt)
    order, factor = moments.order, moments.factor
    left = target.T[order]
    symbols = torch.empty(-(-N // ROWS), K, ROWS, dtype=torch.uint8, device=target.device)
    for first in range(0, K, _BLOCK):
        end = min(first + _BLOCK, K)
        errors = left[first:end]
        symbols[:, order[first:end]] = trellis_block(errors, factor[first:end, first:end], scales, code)
        left[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    return symbols


def _code(fmt: TensorFormat) -> TrellisCode:
    code = fmt.record.trellis
    assert code is not None, f"{fmt} is no trellis format"
    return code


def _packed(symbols: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat) -> TrellisWeight:
    return pack(symbols, scales, fmt.group_size, cast(type[TrellisWeight], fmt.record.weight))


def _levels(symbols: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """float32 [N, K]."""
    return levels_of(_packed(symbols, scales, fmt)).float()
