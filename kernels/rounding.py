"""The column loops of GPTQ and of coordinate descent: in compiled code on the CPU, with one column of all rows at a time on other devices.

Dimension letters: `B` columns of a block, `N` rows. Blocks are transposed, [B, N].
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.cpu import rounding as cpu_rounding

__all__ = ["descend_block", "descend_block_reference", "gptq_block", "gptq_block_reference"]


def gptq_block(columns: torch.Tensor, factor: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whole numbers u, float32 [B, N], chosen column by column; the later columns of the block compensate the error of each.

    On return `columns` holds the errors. The caller subtracts from the columns after the block the factor's columns @ errors.

    Args:
        columns: float32 [B, N], contiguous; overwritten.
        factor: float32 [B, B], the block of the upper Cholesky factor.
        steps, low, high: float32 [B, N]: value = steps * u, u from low to high; a step of 0 stands for a value of 0.
    """
    block = cpu_rounding.gptq_block if columns.device.type == "cpu" else gptq_block_reference
    return block(columns, factor, steps, low, high)


def descend_block(
    u: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """float32 [B, N]: the changes of the values of a block. Column by column, each value moves to its best place with all others fixed.

    Args:
        u: float32 [B, N], contiguous; overwritten.
        slope: float32 [B, N], half the gradient of the error with respect to the block's values, contiguous; overwritten.
        hessian: float32 [B, B], the block on the diagonal.
        steps, low, high: as for `gptq_block`.
    """
    block = cpu_rounding.descend_block if u.device.type == "cpu" else descend_block_reference
    return block(u, slope, hessian, steps, low, high)


def gptq_block_reference(
    columns: torch.Tensor, factor: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """`gptq_block` in plain torch, on any device."""
    u = torch.empty_like(columns)
    safe = torch.where(steps == 0, 1, steps)
    for i in range(len(columns)):
        torch.div(columns[i], safe[i], out=u[i])
        u[i].round_().clamp_(low[i], high[i])
        columns[i].addcmul_(u[i], steps[i], value=-1).div_(factor[i, i])
        columns[i + 1 :].addr_(factor[i, i + 1 :], columns[i], alpha=-1)
    return u


def descend_block_reference(
    u: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """`descend_block` in plain torch, on any device."""
    moved = torch.empty_like(u)
    slants = hessian.diagonal()[:, None] * steps
    still = slants <= 0
    safe = torch.where(still, 1, slants)
    for i in range(len(u)):
        best = (u[i] - slope[i] / safe[i]).round_().clamp_(low[i], high[i])
        best = torch.where(still[i], u[i], best)
        torch.mul(best - u[i], steps[i], out=moved[i])
        u[i] = best
        slope.addr_(hessian[i], moved[i])
    return moved
