"""int3 and int2: the documented layout, bits, errors, dequantization and refused weights."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels.cpu.format_kernels import TILE_KERNELS
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.int2_int3 import Int2Weight, Int3Weight, nibbles, pack_bits, planes, unpack_bits
from dbrx_q.kernels.formats.registry import FORMATS, TensorFormat, offered_formats
from dbrx_q.kernels.formats.weights import dequantize, gather_rows

EVERY = pytest.mark.parametrize("fmt", [fmt for fmt in offered_formats() if fmt.format in ("int2", "int3")], ids=str)


def weights(K: int = 384) -> torch.Tensor:
    """float32 [24, K]: of both signs, of one sign, and groups of zeros."""
    values = torch.randn(24, K, generator=torch.Generator().manual_seed(1)) * 0.02
    values[1::4] = values[1::4].abs()
    values[2::4] = -values[2::4].abs()
    values[3, :128] = 0
    return values


def test_the_layout_is_the_documented_one() -> None:
    """Values of a row, read bit by bit as the docstring draws them."""
    generator = torch.Generator().manual_seed(3)
    for kind, block_bytes, zero_bytes in ((Int3Weight, 48, 3), (Int2Weight, 32, 2)):
        row, zeros = (torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in (2 * block_bytes, zero_bytes))
        scales = torch.rand(8, generator=generator).half()
        values = dequantize(kind(row, scales, zeros, 32))
        codes = []
        for block in row.view(2, -1).tolist():
            of = {}
            for j in range(32):
                of |= {2 * j + 64 * half + odd: block[j] >> 2 * half + 4 * odd & 3 for half in (0, 1) for odd in (0, 1)}
            for j in range(16 if kind is Int3Weight else 0):
                for quarter in range(4):
                    for odd in (0, 1):
                        of[32 * quarter + 2 * j + odd] += (block[32 + j] >> quarter + 4 * odd & 1) * 4
            codes += [of[i] for i in range(128)]
        stream = sum(byte << 8 * i for i, byte in enumerate(zeros.tolist()))
        points = [stream >> kind.bits * g & 2**kind.bits - 1 for g in range(8)]
        expected = [float(scales[i // 32]) * (code - points[i // 32]) for i, code in enumerate(codes)]
        assert values.tolist() == expected


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("n", [1, 7, 16, 96, 128, 160, 640])
def test_packing_round_trips(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    stream, packed = pack_bits(codes, bits), planes(int4.pack(codes), bits)
    assert stream.shape == (3, 2, (n * bits + 7) // 8)
    assert packed.shape == (3, 2, (n + 127) // 128 * 16 * bits)
    assert torch.equal(unpack_bits(stream, bits, n), codes)
    assert torch.equal(int4.unpack(nibbles(packed, bits), n), codes)


@EVERY
def test_an_error_is_at_most_half_a_step_and_bits_are_the_documented_ones(fmt: TensorFormat) -> None:
    weight = weights()
    packed, bits = fmt.record.quantize(weight, fmt.group_size), fmt.record.bits
    groups = 384 // fmt.group_size
    assert packed.shape == weight.shape
    assert packed.nbytes == 24 * (384 * bits // 8 + 2 * groups + (groups * bits + 7) // 8)
    assert [(part.name, part.dtype, part.shape) for part in fmt.parts(*weight.shape)] == [
        (name, part.dtype, tuple(part.shape)) for name, part in packed.parts.items()
    ]
    steps = packed.parts["scales"].float().repeat_interleave(fmt.group_size, -1)
    assert ((dequantize(packed) - weight).abs() <= steps * (0.5 + 2**bits * 2**-11)).all()
    assert (packed.parts["scales"].float() <= (weight.amax() - weight.amin()) / (2**bits - 1) * (1 + 2**-10)).all()
    levels = torch.randint(0, 2**bits, (8, 96), generator=torch.Generator().manual_seed(2))
    levels[:, ::32], levels[:, 1::32] = 0, 2**bits - 1
    exact = (levels - 1) * 0.125  # K is no multiple of 128
    small = fmt.record.quantize(exact, 32)
    assert torch.equal(dequantize(small), exact)
    assert torch.equal(gather_rows(small, torch.tensor([5, 5, 0]), torch.float32), exact[[5, 5, 0]])


@EVERY
def test_tiles_are_the_dequantized_rows_in_int4_order(fmt: TensorFormat) -> None:
    packed, tile = fmt.record.quantize(weights(), fmt.group_size), torch.empty(24, 384)
    TILE_KERNELS[fmt.format].dequantize_rows(packed, tile)
    in_order = tile.unflatten(-1, (-1, 8, 16)).transpose(-1, -2).flatten(-3)
    torch.testing.assert_close(in_order, dequantize(packed), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(2, 96), 64, "must divide.*64.*96"),
        (torch.zeros(2, 96), 16, "one of 32, 64, 128; found 16"),
        (torch.full((2, 64), torch.nan), 64, "finite; found nan"),
        (torch.full((2, 64), 5e5), 64, "65504"),
    ],
    ids=["divides", "offered", "nan", "range"],
)
@pytest.mark.parametrize("name", ["int3", "int2"])
def test_refused_weights(name: str, weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FORMATS[name].quantize(weight, group_size)
