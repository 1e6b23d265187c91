"""The formats of a KV cache, and the torch code that fills one.

Dimension letters: `B` sequences, `G` key/value heads, `L` capacity in tokens, `C` channels of a head.
"""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.kv import KV_FORMATS, allocate_kv, dequantize_kv, quantize_kv
from dbrx_q.kernels.qkv import split_and_rotate, store_qkv

QUANTIZED = ("int8", "int4")
HALF = 2.0**-11  # relative error of a float16


@pytest.mark.parametrize("format", QUANTIZED)
@given(x=arrays.arrays(np.float32, (3, 8), elements=st.floats(-1000, 1000, width=32)))
@settings(deadline=None, max_examples=60)
def test_the_error_is_at_most_half_a_step(format: str, x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    error = (dequantize_kv(*quantize_kv(values, format), format, torch.float32) - values).abs()
    if format == "int8":
        span, levels = values.abs().amax(-1, keepdim=True), 127
    else:
        span, levels = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True), 15
    # A step that is rounded down clips the outermost values by up to `levels` rounding errors of a step; the smallest is 2^-25.
    rounding = span * HALF + levels * 2.0**-25 + values.abs().amax(-1, keepdim=True) * HALF + 2.0**-25
    assert (error <= span / levels / 2 * (1 + HALF) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("format", QUANTIZED)
def test_values_on_the_grid_round_trip_exactly(format: str, dtype: torch.dtype) -> None:
    codes = torch.arange(-127, 128.0) if format == "int8" else torch.arange(16.0)
    codes = codes[torch.randint(len(codes), (4, 64), generator=torch.Generator().manual_seed(0))]
    codes[:, 0], codes[:, 1] = (127, -127) if format == "int8" else (0, 15)
    x = (codes * 0.25 - (0 if format == "int8" else 1)).to(dtype)
    assert torch.equal(dequantize_kv(*quantize_kv(x, format), format, dtype), x)


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_long_sequence_is_dequantized_in_pieces_to_the_same_bits(format: str) -> None:
    cache = allocate_kv(format, 1, 2, 5000, 128, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(2, 5000, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_kv(x, format)
    for part, value in ((cache.keys, codes), (cache.values, codes), (cache.key_scales, scales), (cache.value_scales, scales)):
        assert part is not None
        part[0] = value
    for values in cache.row(0, 4999, torch.bfloat16):
        assert torch.equal(values, dequantize_kv(codes, scales, format, torch.bfloat16)[:, :4999])


def test_int4_stores_both_halves_of_a_head_in_the_same_bytes() -> None:
    codes, scales = quantize_kv(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 15]), "int4")
    assert codes.tolist() == [0x40, 0x51, 0x62, 0xF3]
    assert scales.tolist() == [1, 0]


def test_ties_round_to_even() -> None:
    codes, _ = quantize_kv(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]), "int8")
    assert codes.tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 1e-9, 60000.0, -60000.0])
def test_constant_heads_round_trip(format: str, value: float) -> None:
    x = torch.full((2, 16), value)
    back = dequantize_kv(*quantize_kv(x, format), format, torch.float32)
    torch.testing.assert_close(back, x, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("format", QUANTIZED)
def test_values_beyond_the_range_of_float16_steps_saturate(format: str) -> None:
    x = torch.tensor([-1e30, 0.0, 1.0, 1e30])
    back = dequantize_kv(*quantize_kv(x, format), format, torch.float32)
    assert back.isfinite().all()
    assert back[0] < back[1] <= back[2] < back[3]


@pytest.mark.parametrize(
    ("format", "nbytes"), [("plain", 2 * 6 * 5 * 16 * 2), ("int8", 2 * 6 * 5 * (16 + 2)), ("int4", 2 * 6 * 5 * (8 + 4))]
)
def test_bytes_of_a_layer(format: str, nbytes: int) -> None:
    assert allocate_kv(format, 2, 3, 5, 16, torch.bfloat16, torch.device("cpu")).nbytes == nbytes


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(FormatError, match="found 'fp8'"):
        allocate_kv("fp8", 1, 1, 1, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(FormatError, match="found 7"):
        allocate_kv("int4", 1, 1, 1, 7, torch.float32, torch.device("cpu"))
    for function in (
        lambda: quantize_kv(torch.ones(8), "plain"),
        lambda: dequantize_kv(torch.ones(8), torch.ones(1), "plain", torch.float32),
    ):
        with pytest.raises(FormatError, match="found 'plain'"):
            function()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_store_qkv_writes_every_token_to_its_position(format: str) -> None:
    H, G, C, T = 4, 2, 16, 3
    generator = torch.Generator().manual_seed(0)
    qkv, angles = torch.randn(T, (H + 2 * G) * C, generator=generator), torch.rand(T, C // 2, generator=generator)
    cache = allocate_kv(format, 2, G, 7, C, torch.float32, torch.device("cpu"))
    rows, positions = torch.tensor([1, -1, 0], dtype=torch.int32), torch.tensor([6, 0, 2], dtype=torch.int32)
    out = store_qkv(qkv, cache, rows, positions, angles.cos(), angles.sin(), heads=H, clip=1.0)
    q, k, v = split_and_rotate(qkv.clamp(-1, 1), angles.cos(), angles.sin(), heads=H, channels=C)
    assert torch.equal(out, q)
    keys, values = (torch.zeros(2, G, 7, C) for _ in range(2))
    for token in (0, 2):
        for expected, source in ((keys, k), (values, v)):
            x = source[token] if format == "plain" else dequantize_kv(*quantize_kv(source[token], format), format, torch.float32)
            expected[rows[token], :, positions[token]] = x
    for row in range(2):
        stored = cache.row(row, 7, torch.float32)
        assert torch.equal(stored[0], keys[row])
        assert torch.equal(stored[1], values[row])


def test_rotary_embedding_is_complex_multiplication() -> None:
    """The first half of the channels are the real parts, the second half the imaginary parts."""
    x, angles = torch.randn(5, 3 * 16), torch.rand(5, 8) * 6
    q, k, v = split_and_rotate(x, angles.cos(), angles.sin(), heads=1, channels=16)
    rotated = torch.complex(*x.view(5, 3, 16).chunk(2, dim=-1)) * torch.polar(torch.ones(5, 8), angles)[:, None]
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    torch.testing.assert_close(torch.cat((q, k), dim=1), expected[:, :2], rtol=1e-5, atol=1e-6)
    assert torch.equal(v, x.view(5, 3, 16)[:, 2:])
