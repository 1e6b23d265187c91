"""q4_0: int4 weights that llama.cpp's Q4_0 holds without loss, and which are int4 in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbrx_q.kernels.formats import int4, q4_0
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.weights import dequantize

Q4_0 = TensorFormat.parse("q4_0")


def blocks_of(weight: int4.Int4Weight) -> np.ndarray:
    """The bytes of llama.cpp's Q4_0 [N, K/32 * 18]: d, then the codes of elements 0-15 in low and of 16-31 in high nibbles."""
    N, K = weight.shape
    codes = int4.unpack(weight.qweight, K).unflatten(-1, (-1, 32))
    zeros = int4.unpack(weight.zeros, K // 32)
    assert ((zeros == 7) | (zeros == 8)).all()
    negative = (zeros == 7).unsqueeze(-1)
    codes = torch.where(negative, 15 - codes, codes)
    d = torch.where(negative, -weight.scales.unsqueeze(-1), weight.scales.unsqueeze(-1))
    return torch.cat((d.view(torch.uint8), codes[..., :16] | codes[..., 16:] << 4), -1).reshape(N, -1).numpy()


def test_llama_cpp_reads_the_same_values() -> None:
    import gguf

    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = q4_0.quantize(weight)
    theirs = gguf.dequantize(blocks_of(packed), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(theirs), dequantize(packed))


def test_the_range_is_covered_and_an_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] = 0
    packed = q4_0.quantize(weight)
    steps = packed.scales.float().repeat_interleave(32, -1)
    assert ((dequantize(packed) - weight).abs() <= steps * (0.5 + 8 * 2**-11)).all()
    groups = weight.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1)
    assert (packed.scales.float() >= largest / 8 * (1 - 2**-10)).all()
    assert (packed.scales.float() <= largest / 7 * (1 + 2**-10)).all()
    codes = (torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(3)) * 0.5).index_fill(1, torch.tensor([0, 32]), -4.0)
    assert torch.equal(dequantize(q4_0.quantize(codes)), codes)
    assert torch.equal(dequantize(q4_0.quantize(-codes)), -codes)


def test_a_loaded_weight_is_int4() -> None:
    packed = q4_0.quantize(torch.randn(4, 64))
    assert Q4_0.in_memory == TensorFormat("int4", 32)
    assert packed.format == "int4"
    assert Q4_0.parts(4, 64) == TensorFormat("int4", 32).parts(4, 64)
    loaded = Q4_0.load(packed.parts)
    assert type(loaded) is int4.Int4Weight
    assert torch.equal(dequantize(loaded), dequantize(packed))


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(2, 48), 32, "must divide.*32.*48"),
        (torch.zeros(2, 64), 64, "one of 32; found 64"),
        (torch.full((2, 64), torch.nan), 32, "finite; found nan"),
        (torch.full((2, 64), 1e6), 32, "65504"),
    ],
    ids=["divides", "offered", "nan", "range"],
)
def test_refused_weights(weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        q4_0.quantize(weight, group_size)
