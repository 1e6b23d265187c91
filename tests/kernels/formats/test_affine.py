"""affine4, affine8 and their bfloat16 forms: bits, error, dequantization and refused weights."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels.formats.affine import Affine4Weight, Affine8Weight, dequantize
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.registry import FORMATS, TensorFormat, offered_formats
from dbrx_q.kernels.formats.weights import gather_rows

AFFINE = [fmt for fmt in offered_formats() if fmt.format.startswith("affine")]
EVERY = pytest.mark.parametrize("fmt", AFFINE, ids=str)


def weights(K: int = 384) -> torch.Tensor:
    """float32 [24, K]: around 0, far above 0, far below 0, and constant groups."""
    values = torch.randn(24, K, generator=torch.Generator().manual_seed(1)) * 0.02
    values[1::4] += 0.5
    values[2::4] -= 3
    values[3::4] = torch.linspace(-1, 1, K).unflatten(0, (-1, 128))[:, :1].expand(-1, 128).flatten()
    return values


def test_the_layout_is_the_documented_one() -> None:
    scales, offsets = torch.tensor([[0.5, -0.25]]).half(), torch.tensor([[-1.0, 3.0]]).half()
    codes = torch.tensor([[0x21, 0xF3, *[0] * 14, 0xF0, *[0] * 15]], dtype=torch.uint8)
    values = dequantize(Affine4Weight(codes, scales, offsets, 32))[0]
    assert values[:4].tolist() == [-0.5, 0.0, 0.5, 6.5]
    assert values[32:35].tolist() == [3.0, -0.75, 3.0]
    bytes_ = torch.zeros(1, 64, dtype=torch.uint8)
    bytes_[0, 1], bytes_[0, 63] = 255, 4
    values = dequantize(Affine8Weight(bytes_, scales, offsets, 32))[0]
    assert values[:2].tolist() == [-1.0, 126.5]
    assert values[63] == 2.0


@EVERY
def test_an_error_is_at_most_half_a_step_and_the_rounding_of_scale_and_offset(fmt: TensorFormat) -> None:
    weight = weights()
    packed = fmt.record.quantize(weight, fmt.group_size)
    parts = packed.parts
    assert packed.shape == weight.shape
    assert 8 * packed.nbytes == weight.numel() * (fmt.record.bits + 32 / fmt.group_size)
    assert {parts["scales"].dtype, parts["offsets"].dtype} == {torch.bfloat16 if fmt.format.endswith("bf16") else torch.float16}
    assert [(part.name, part.dtype, part.shape) for part in fmt.parts(*weight.shape)] == [
        (name, part.dtype, tuple(part.shape)) for name, part in parts.items()
    ]
    error = (fmt.record.dequantize(packed, torch.float32) - weight).unflatten(-1, (-1, fmt.group_size)).abs().amax(-1)
    groups, levels = weight.unflatten(-1, (-1, fmt.group_size)), 2**fmt.record.bits - 1
    spread, rounding = groups.amax(-1) - groups.amin(-1), torch.finfo(parts["scales"].dtype).eps / 2
    assert (error <= spread / levels / 2 + rounding * (2 * spread + groups.amin(-1).abs()) + 1e-5).all()
    assert (error[0] >= spread[0] / levels / 4).all()


@EVERY
def test_values_on_the_grid_round_trip_exactly(fmt: TensorFormat) -> None:
    levels = 2**fmt.record.bits - 1
    codes = torch.randint(0, levels + 1, (8, 256), generator=torch.Generator().manual_seed(2))
    codes.unflatten(-1, (-1, fmt.group_size))[..., :2] = torch.tensor([0, levels])
    exact = codes * 0.125 + 3
    packed = fmt.record.quantize(exact, fmt.group_size)
    assert torch.equal(fmt.record.dequantize(packed, torch.float32), exact)
    assert torch.equal(gather_rows(packed, torch.tensor([5, 5, 0]), torch.float32), exact[[5, 5, 0]])


@EVERY
def test_constant_groups_are_exact_as_far_as_their_dtype_allows(fmt: TensorFormat) -> None:
    packed = fmt.record.quantize(weights()[3::4], fmt.group_size)
    values = weights()[3::4]
    expected = values.to(packed.parts["offsets"].dtype).float()
    assert torch.equal(fmt.record.dequantize(packed, torch.float32), expected)
    assert (packed.parts["scales"] == 0).all()


@EVERY
def test_leading_axes_are_independent_and_one_rounding_is_of_the_sum(fmt: TensorFormat) -> None:
    stack = weights().view(3, 8, -1)
    packed = fmt.record.quantize(stack, fmt.group_size)
    for e in range(3):
        assert torch.equal(fmt.record.dequantize(packed[e], torch.float32), fmt.record.dequantize(packed, torch.float32)[e])
    codes = packed.parts["qweight"]
    if fmt.record.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    scales, offsets = (packed.parts[name].double().repeat_interleave(fmt.group_size, -1) for name in ("scales", "offsets"))
    exact = codes.double() * scales + offsets
    assert torch.equal(fmt.record.dequantize(packed, torch.float32), exact.float())
    assert torch.equal(fmt.record.dequantize(packed, torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("affine4", torch.zeros(2, 96), "must divide.*64.*96"),
        ("affine8", torch.full((2, 64), torch.nan), "finite; found nan"),
        ("affine4", torch.arange(128.0).view(2, 64) * 1e5, "65504"),
        ("affine4", torch.full((2, 64), -1e5), "65504, float16"),
        ("affine4-bf16", torch.full((2, 64), -3.4e38), r"3\.3895e\+38, bfloat16"),
    ],
    ids=["divides", "nan", "range", "offset", "bfloat16"],
)
def test_refused_weights(name: str, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FORMATS[name].quantize(weight, 64)


def test_bfloat16_holds_what_float16_does_not() -> None:
    weight = torch.linspace(-1e6, 1e6, 64).expand(2, 64)
    for name in ("affine4-bf16", "affine8-bf16"):
        packed = FORMATS[name].quantize(weight, 64)
        assert (FORMATS[name].dequantize(packed, torch.float32) - weight).abs().max() < 1.2e5
