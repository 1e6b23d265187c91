"""The methods by name: each quantizes a matrix, the calibrated ones with the moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import FORMATS, TensorFormat
from dbrx_q.kernels.formats.rotation import rotate

from .gptq import gptq
from .grid import Grid, packed, searched_grid, to_nearest
from .hqq import hqq_grid
from .moments import Moments
from .refine import descend, fit_scales
from .rtn import rtn
from .trellis import trellis_gptq, trellis_nearest

__all__ = ["METHODS", "Method", "Rounded"]


# Output errors are measured on every 16th row, or on more rows if those are fewer than 32. A tile of a trellis format has 128 rows, and the
# tiles of a matrix with many inputs are many, so 8 rows of each are enough there; 32 took as long as GPTQ's updates.
_SAMPLE_STEP, _SAMPLE_ROWS = 16, 32
_MANY_INPUTS = 2048


@dataclass(frozen=True)
class Rounded:
    """Some rows of a matrix, quantized."""

    packed: QuantizedWeight
    """The rows."""
    error: float
    """Sum of squared errors."""
    square: float
    """Sum of squares of the weight."""
    output_error: float = 0.0
    """Sum of squared errors of the outputs of a sample of rows on the calibration tokens, from the Hessian; 0 without a Hessian."""
    output_square: float = 0.0
    """Sum of squares of the outputs of the same sample."""


@dataclass(frozen=True)
class Method:
    """A quantization method."""

    run: Callable[[torch.Tensor, TensorFormat, Moments | None], Rounded]
    """Takes (weight [N, K], format, moments or None) and returns the quantized rows, which are independent of each other."""
    calibrated: bool
    """Whether it uses moments; a matrix without moments gets a searched grid instead."""
    summary: str
    """A description of one line."""
    needs_grid: bool = True
    """Whether it makes only formats with a uniform grid and, where `trellis` says so, trellis formats."""
    trellis: bool = False
    """Whether it makes trellis formats."""
    compares: bool = False
    """Whether it needs the activations of the original model beside those of the quantized one."""
    folds: bool = False
    """Whether the columns of w2 are scaled beforehand, and the rows of v1 inversely."""
    squares: bool = False
    """Whether the diagonal of the moments is enough."""
    shrinks: bool = False
    """Whether damping and the weights of sources are chosen for each matrix (`shrinkage.py`), in place of the usual damping."""
    in_pieces: bool = True
    """Whether several threads each take some rows at a time; rtn has threads of its own, except for trellis formats (`takes_pieces`)."""

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of the formats that it makes."""
        return tuple(
            name
            for name, record in FORMATS.items()
            if record.grid is not None or not self.needs_grid or (self.trellis and record.trellis is not None)
        )

    def takes_pieces(self, fmt: TensorFormat) -> bool:
        """Whether several threads each take some rows of a matrix in this format at a time."""
        return self.in_pieces or fmt.record.trellis is not None

    def check(self, name: str, fmt: TensorFormat) -> None:
        """Refuse a format that the method does not make.

        Raises:
            FormatError: names the method, and those that make the format.
        """
        if fmt.format not in self.formats:
            others = " or ".join(other for other, method in METHODS.items() if fmt.format in method.formats)
            raise FormatError(f"{name} makes {', '.join(self.formats)}; found {fmt.format}. Choose one of them, or the method {others}")


def _rtn(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    return Rounded(*rtn(weight, fmt))


def _nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    """The weight rounded to the nearest values of a grid."""
    return Rounded(*to_nearest(weight, grid))


def _fitted(weight: torch.Tensor, target: torch.Tensor, grid: Grid, u: torch.Tensor, hessian: torch.Tensor) -> Rounded:
    """The result for whole numbers u that were chosen for a target, which may differ from the weight itself."""
    return _measured(packed(grid, u), grid.dequantize(u), weight.float(), target, hessian)


def _measured(packed: QuantizedWeight, values: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> Rounded:
    """The result with these values, float32 [N, K], in the basis of weight, target and Hessian."""
    error, square = (float(part.square().sum(dtype=torch.float64)) for part in (values - weight, weight))
    return Rounded(packed, error, square, *_energies(values, target, hessian))


def _energies(values: torch.Tensor, aim: torch.Tensor, hessian: torch.Tensor) -> tuple[float, float]:
    """Sums of r H r^T over a sample of the rows r of the errors and of what was aimed at."""
    step = _SAMPLE_STEP if len(hessian) >= _MANY_INPUTS else max(1, min(_SAMPLE_STEP, len(aim) // _SAMPLE_ROWS))
    values, aim = values[::step], aim[::step]
    rows = torch.cat((values - aim, aim))
    error, square = ((rows @ hessian) * rows).sum(1, dtype=torch.float64).view(2, -1).sum(1).tolist()
    return error, square


def _clip(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    if fmt.record.trellis is not None:
        return Rounded(*trellis_nearest(weight, fmt))
    return _nearest(weight, searched_grid(weight, fmt))


def _hqq(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    return _nearest(weight, hqq_grid(weight, fmt))


def _awq(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    """Ranges searched with each element's error weighted by the mean square of its input (Lin et al. 2023, "AWQ")."""
    return _nearest(weight, searched_grid(weight, fmt, None if moments is None else moments.importance))


def _gptq(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    if moments is None or moments.hessian is None:
        return _clip(weight, fmt, None)
    if fmt.record.trellis is not None:
        return _trellis(weight, fmt, moments)
    wide = weight.float()
    grid = searched_grid(wide, fmt, moments.inverse_hessian_cost)
    return _fitted(weight, wide, grid, gptq(wide, moments, grid), moments.hessian)


def _best(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
    """GPTQ of the matrix that compensates earlier errors, then scales fitted to its codes and codes fitted to those scales."""
    if moments is None or moments.hessian is None:
        return _clip(weight, fmt, None)
    if fmt.record.trellis is not None:
        return _trellis(weight, fmt, moments)
    target = moments.corrected_target(weight.float())
    grid = searched_grid(target, fmt, moments.inverse_hessian_cost)
    u = gptq(target, moments, grid)
    grid = fit_scales(target, moments.hessian, grid, u)
    return _fitted(weight, target, grid, descend(target, moments.hessian, grid, u, sweeps=2), moments.hessian)


def _trellis(weight: torch.Tensor, fmt: TensorFormat, moments: Moments) -> Rounded:
    """GPTQ with streams in the rotated basis; of the matrix that compensates earlier errors, where the moments have a cross term."""
    rotated = moments.rotated(fmt.group_size)
    assert rotated.hessian is not None
    wide = rotate(weight, fmt.group_size)
    target = rotated.corrected_target(wide)
    return _measured(*trellis_gptq(target, fmt, rotated), wide, target, rotated.hessian)


METHODS = {
    "rtn": Method(_rtn, False, "round to nearest", needs_grid=False, trellis=True, in_pieces=False),
    "clip": Method(_clip, False, "round to nearest in ranges searched for the least squared error", trellis=True),
    "hqq": Method(_hqq, False, "half-quadratic: ranges fitted to most elements, not to outliers"),
    "awq": Method(_awq, True, "ranges searched for the least error, weighted by the size of inputs; w2's columns scaled", folds=True),
    "gptq": Method(_gptq, True, "GPTQ with act-order and Hessians weighted by the router", trellis=True),
    "best": Method(
        _best,
        True,
        "GPTQ of weights that compensate earlier errors, then refined scales and codes",
        trellis=True,
        compares=True,
        shrinks=True,
    ),
}
"""The methods, by their names on the command line."""
