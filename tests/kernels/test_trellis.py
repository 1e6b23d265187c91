"""The compiled search of trellis streams against its definition in plain torch, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dbrx_q.kernels.formats.trellis import first_scales
from dbrx_q.kernels.formats.trellis_codes import CODES, TrellisCode
from dbrx_q.kernels.trellis import encode, trellis_block, trellis_block_reference


def weight_of(N: int, K: int, seed: int = 0) -> torch.Tensor:
    """Normal values in rows of different scales, with a constant row, a row of zeros and a huge outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * torch.randn(N, 1, generator=generator).exp()
    weight[1], weight[2], weight[3, 0] = 0.0, 0.5, 1000.0
    return weight


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_streams_equal_those_of_the_definition(code: TrellisCode) -> None:
    weight = weight_of(150, 3)
    scales = first_scales(weight, code)
    expected = trellis_block_reference(weight.T.contiguous(), None, scales, code)
    assert torch.equal(encode(weight, scales, code), expected)


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_feedback_equals_a_loop_over_columns(code: TrellisCode) -> None:
    K = 6 if code.state_bits == 10 else 2
    weight = weight_of(150, K)
    factor = torch.randn(K, K, generator=torch.Generator().manual_seed(1)).triu() / 4 + torch.eye(K)
    scales = first_scales(weight, code)
    columns, expected = weight.T.contiguous(), weight.T.contiguous()
    symbols = trellis_block(columns, factor, scales, code)
    assert torch.equal(symbols, trellis_block_reference(expected, factor, scales, code))
    assert torch.equal(columns, expected)


@pytest.mark.parametrize("name", ["trellis2", "trellis4-fast"])
def test_streams_are_the_same_where_costs_and_sums_reach_their_caps(name: str) -> None:
    code, weight = CODES[name], weight_of(128, 2, seed=1)
    scales = first_scales(weight, code) / 5
    assert torch.equal(encode(weight, scales, code), trellis_block_reference(weight.T.contiguous(), None, scales, code))


def test_streams_are_the_same_on_several_threads() -> None:
    code = CODES["trellis3-fast"]
    weights = [weight_of(128, 8, seed) for seed in range(6)]
    expected = [encode(weight, first_scales(weight, code), code) for weight in weights]
    with ThreadPoolExecutor(3) as pool:
        symbols = list(pool.map(lambda weight: encode(weight, first_scales(weight, code), code), weights))
    assert all(torch.equal(*pair) for pair in zip(symbols, expected, strict=True))
