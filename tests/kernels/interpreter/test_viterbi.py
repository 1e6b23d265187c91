"""The trellis search in the interpreter finds the streams of the definition and of compiled code, bit for bit."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.trellis import first_scales
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.kernels.trellis import encode, trellis_block


def weight_of(N: int, K: int) -> torch.Tensor:
    """Normal values in rows of different scales, a row of zeros, constant rows, which let paths tie, and a huge outlier."""
    generator = torch.Generator().manual_seed(N)
    weight = torch.randn(N, K, generator=generator) * torch.randn(N, 1, generator=generator).exp()
    weight[1], weight[3, 0] = 0.0, 1000.0
    weight[20:90] = 0.5
    return weight


@pytest.mark.parametrize(("name", "N"), [("trellis2", 100), ("trellis3-fast", 130), ("trellis4-fast", 128)])
def test_streams_equal_those_of_the_definition(name: str, N: int) -> None:
    code, weight = CODES[name], weight_of(N, 1)
    scales = first_scales(weight, code)
    # In plain torch, states of 14 bits take ten seconds; `tests/kernels/test_trellis.py` compares compiled code with it.
    expected = encode(weight, scales, code, backend=Backend.REFERENCE if code.state_bits < 14 else Backend.CPU)
    assert torch.equal(encode(weight, scales, code), expected)


def test_feedback_equals_the_definition_and_compiled_code() -> None:
    """The last tile is filled up, and the factor is a part of a larger one."""
    code, weight = CODES["trellis2-fast"], weight_of(131, 2)
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).triu() / 4 + torch.eye(4)
    factor, scales = factor[1:3, 1:3], first_scales(weight, code)
    results = []
    for backend in (None, Backend.CPU, Backend.REFERENCE):
        columns = weight.T.contiguous()
        results.append((trellis_block(columns, factor, scales, code, backend=backend), columns))
    (streams, errors), *others = results
    assert not torch.equal(errors, weight.T)
    for other in others:
        assert torch.equal(streams, other[0])
        assert torch.equal(errors, other[1])


def test_of_equal_paths_the_lowest_is_taken() -> None:
    """In a column of zeros many paths cost nothing; in a column of huge values all levels but the largest have the largest cost."""
    code = CODES["trellis4-fast"]
    weight = torch.tensor([0.0, 1e4]).repeat(128, 1)
    scales = torch.ones(128, dtype=torch.float16)
    assert torch.equal(encode(weight, scales, code), encode(weight, scales, code, backend=Backend.REFERENCE))


def test_sums_of_the_first_pass_saturate() -> None:
    """Elements far beyond all levels, of either sign: no path is cheap, so the paths of many ends have the largest sum."""
    code = CODES["trellis2-fast"]
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(128, 24, generator=generator).sign() * torch.rand(128, 24, generator=generator) * 300
    weight = weight[:, [2, 4]]  # whose streams would be others without saturation
    scales = torch.ones(128, dtype=torch.float16)
    assert torch.equal(encode(weight, scales, code), encode(weight, scales, code, backend=Backend.REFERENCE))
