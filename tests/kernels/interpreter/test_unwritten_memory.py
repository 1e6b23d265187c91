"""The tests of kernels find one that reads what nobody wrote, or leaves a part of its result unwritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

N = 64


@triton.jit
def sum_kernel(x, partial, y, WRITTEN: tl.constexpr, READ: tl.constexpr, BN: tl.constexpr):
    """y = x + x, by two partial results of which the second may not be stored."""
    columns = tl.arange(0, BN)
    for part in range(2):
        tl.store(partial + part * BN + columns, tl.load(x + columns), mask=part * BN + columns < WRITTEN)
    total = tl.load(partial + columns) + tl.load(partial + BN + columns, mask=BN + columns < READ, other=0.0)
    tl.store(y + columns, total)


ALLOCATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda x: torch.empty(2 * N, dtype=x.dtype),
    "empty_like": lambda x: torch.empty_like(torch.cat([x, x])),
    "empty_strided": lambda x: torch.empty_strided((2 * N,), (1,), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(2 * N),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_memory_that_nobody_wrote_shows_in_the_result(allocation: str, dtype: torch.dtype) -> None:
    x, y = torch.ones(N, dtype=dtype), torch.zeros(N, dtype=dtype)
    for written, read, right in ((2 * N, 2 * N, True), (2 * N - 1, 2 * N, False), (2 * N - 1, 2 * N - 1, True)):
        sum_kernel[(1,)](x, ALLOCATIONS[allocation](x), y, WRITTEN=written, READ=read, BN=N)
        expected = torch.full((N,), 2, dtype=dtype)
        expected[-1] = 2 if read == 2 * N else 1
        assert torch.equal(y, expected) == right
        assert torch.equal(y[:-1], expected[:-1])
        if not right:
            assert y[-1].isnan() if dtype.is_floating_point else y[-1] == 78
