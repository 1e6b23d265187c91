"""Blocks of GPTQ and of coordinate descent: compiled code compared with the plain torch code that runs on GPUs."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels.cpu import rounding as cpu_rounding
from dbrx_q.kernels.rounding import descend_block_reference, gptq_block_reference

ROWS = pytest.mark.parametrize("rows", [1, 16, 37, 512])
B = 24


def block_and_grid(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(columns, steps of which some are 0, smallest codes, largest codes), float32 [B, rows]."""
    generator = torch.Generator().manual_seed(rows)
    columns, steps = torch.randn(B, rows, generator=generator), torch.rand(B, rows, generator=generator) * 0.2 + 0.02
    steps[3, ::2] = 0
    low = -torch.randint(0, 16, (B, rows), generator=generator).float()
    return columns, steps, low, low + 15


@ROWS
def test_gptq_block_equals_torch(rows: int) -> None:
    columns, *grid = block_and_grid(rows)
    factor = torch.randn(B, B, generator=torch.Generator().manual_seed(1)).mul_(0.1).triu_(1) + 2 * torch.eye(B)
    errors, expected_errors = columns.clone(), columns.clone()
    codes, expected = cpu_rounding.gptq_block(errors, factor, *grid), gptq_block_reference(expected_errors, factor, *grid)
    assert torch.equal(codes, expected)
    assert torch.allclose(errors, expected_errors, atol=1e-5)
    # An error is the column corrected for those before it, less its rounded value, divided by the factor's diagonal.
    left = columns.double() - torch.triu(factor, 1).T.double() @ errors.double()
    assert torch.allclose((left - codes * grid[0]) / factor.diagonal()[:, None], errors.double(), atol=1e-4)
    assert torch.equal(codes, (left / torch.where(grid[0] == 0, 1, grid[0])).round().clamp(grid[1], grid[2]).float())


@ROWS
def test_descend_block_equals_torch(rows: int) -> None:
    slope, *grid = block_and_grid(rows)
    inputs = torch.randn(100, B, generator=torch.Generator().manual_seed(2))
    hessian = inputs.T @ inputs / 100
    hessian[5] = hessian[:, 5] = 0  # an input that is always zero
    before = (slope / 0.1).round().clamp(grid[1], grid[2])
    runs = []
    for block in (cpu_rounding.descend_block, descend_block_reference):
        u, slopes = before.clone(), slope.clone()
        runs.append((block(u, slopes, hessian, *grid), u, slopes))
    (moved, u, slopes), expected = runs
    assert torch.equal(u, expected[1])
    assert torch.allclose(moved, expected[0], atol=1e-5)
    assert torch.allclose(slopes, expected[2], atol=1e-4)
    assert torch.allclose(moved, (u - before) * grid[0], atol=1e-5)
    assert torch.allclose(slopes, slope + hessian @ moved, atol=1e-4)
    assert not moved[5].any()
    assert not moved[3, ::2].any()
