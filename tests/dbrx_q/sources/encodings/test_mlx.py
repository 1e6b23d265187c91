"""MLX's layers: values by the formula, exact repacking, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.encodings.base import LoadedParts
from dbrx_q.sources.encodings.mlx import Mlx

from .stored import linear_of, mlx_parts

_AFFINE = {(bits, dtype) for bits in (2, 3, 4, 5, 6, 8) for dtype in (torch.float16, torch.bfloat16, torch.float32)}


def _affine(N: int, K: int, G: int, bits: int, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """codes [N, K], and scales and biases [N, n] of both signs."""
    rng = np.random.default_rng(bits * K + G)
    scales, biases = (torch.from_numpy(rng.normal(size=(N, K // G)) / 50).to(dtype) for _ in range(2))
    return rng.integers(0, 2**bits, (N, K)), scales, biases


@pytest.mark.parametrize(("bits", "dtype"), sorted(_AFFINE, key=str))
@pytest.mark.parametrize(("N", "K", "G"), [(3, 96, 32), (5, 192, 64), (8, 256, 128)])
def test_values_and_repacked_values_are_those_of_the_formula(N: int, K: int, G: int, bits: int, dtype: torch.dtype) -> None:
    codes, scales, biases = _affine(N, K, G, bits, dtype)
    parts = mlx_parts(codes, scales, biases, bits)
    encoding, linear = Mlx(), linear_of((N, K), parts)
    encoding.check(linear)
    expected = np.zeros((N, K), dtype=np.float32)
    wide_scales, wide_biases = scales.float().numpy(), biases.float().numpy()
    for j in range(N):
        for k in range(K):
            expected[j, k] = wide_scales[j, k // G] * np.float32(codes[j, k]) + wide_biases[j, k // G]
    expected_bits = torch.from_numpy(expected).view(torch.int32)
    assert torch.equal(encoding.dequantize(linear, parts).view(torch.int32), expected_bits)
    assert torch.equal(encoding.read_rows(linear, LoadedParts(parts), 1, 2).view(torch.int32), expected_bits[1:3])
    assert encoding.label(linear) == f"MLX affine{bits}:{G}"
    fmt = encoding.exact_format(linear)
    if dtype == torch.float32:
        assert fmt is None
        return
    name = f"affine{4 if bits <= 4 else 8}"
    assert fmt == TensorFormat(name if dtype == torch.float16 else f"{name}-bf16", G)
    packed = encoding.repack(linear, parts)
    assert [(part.dtype, tuple(part.shape), part.is_contiguous()) for part in packed.parts.values()] == [
        (part.dtype, part.shape, True) for part in fmt.parts(N, K)
    ]
    assert torch.equal(dequantize(packed).view(torch.int32), expected_bits)


_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 128 else magnitude


@pytest.mark.parametrize(("mode", "bits", "G"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_small_floats_are_those_of_their_definition(mode: str, bits: int, G: int) -> None:
    rng = np.random.default_rng(bits + G)
    codes = rng.integers(0, 2**bits, (4, 96))
    codes[codes & 127 == 127] = 0  # E4M3 has no infinity, but NaN
    stored = rng.integers(1, 120, (4, 96 // G)) if mode == "nvfp4" else rng.integers(100, 140, (4, 96 // G))
    parts = mlx_parts(codes, torch.from_numpy(stored.astype(np.uint8)), None, bits)
    encoding, linear = Mlx(), linear_of((4, 96), parts)
    encoding.check(linear)
    assert encoding.label(linear) == f"MLX {mode}"
    expected = np.zeros((4, 96), dtype=np.float32)
    for j in range(4):
        for k in range(96):
            code, scale = int(codes[j, k]), int(stored[j, k // G])
            value = _e4m3(code) if bits == 8 else _E2M1[code & 7] * (-1 if code & 8 else 1)
            expected[j, k] = value * (_e4m3(scale) if mode == "nvfp4" else 2.0 ** (scale - 127))
    values = encoding.dequantize(linear, parts)
    assert torch.equal(values, torch.from_numpy(expected))
    assert torch.equal(encoding.read_rows(linear, LoadedParts(parts), 2, 1), torch.from_numpy(expected[2:3]))
    fmt = encoding.exact_format(linear)
    assert fmt == (TensorFormat("affine8-bf16", 32) if mode == "mxfp4" else None)
    if fmt is not None:
        packed = encoding.repack(linear, parts)
        assert [(part.dtype, tuple(part.shape), part.is_contiguous()) for part in packed.parts.values()] == [
            (part.dtype, part.shape, True) for part in fmt.parts(4, 96)
        ]
        assert torch.equal(dequantize(packed).view(torch.int32), values.view(torch.int32))


def test_mxfp4_is_exact_at_the_ends_of_its_scales() -> None:
    """From 2^-127, below the normal numbers of float32, to the largest whose twelvefold half bfloat16 holds."""
    codes = np.tile(np.arange(16), (2, 4))
    for stored in (0, 1, 2, 250, 251):
        parts = mlx_parts(codes, torch.full((2, 2), stored, dtype=torch.uint8), None, 4)
        linear = linear_of((2, 64), parts)
        values = Mlx().dequantize(linear, parts)
        assert values[0, 1].item() == 0.5 * 2.0 ** (stored - 127)
        assert torch.equal(dequantize(Mlx().repack(linear, parts)).view(torch.int32), values.view(torch.int32))
    parts = mlx_parts(codes, torch.full((2, 2), 253, dtype=torch.uint8), None, 4)
    with pytest.raises(CheckpointError, match="layer: scales must be finite; found -inf"):
        Mlx().repack(linear_of((2, 64), parts), parts)


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        ("weight", torch.zeros(4, 7, dtype=torch.uint32), r"weight must be uint32 \[4, 64 \* bits / 32\] .* found \[4, 7\]"),
        ("weight", torch.zeros(4, 8, dtype=torch.int64), r"weight must be uint32 \[4, 8\] for a weight \[4, 64\]; found int64"),
        ("scales", torch.zeros(4, 4), r"scales must be \[4, 64 / group size\] with groups of 32 or 64 or 128; found \[4, 4\]"),
        ("scales", torch.zeros(4, 2, dtype=torch.uint8), r"scales must be bfloat16 or float16 or float32 \[4, 2\] .* found uint8"),
        ("biases", torch.zeros(4, 1), r"biases must be float32 \[4, 2\] .* found float32 \[4, 1\]"),
        ("biases", torch.zeros(4, 2, dtype=torch.float16), r"biases must be float32 \[4, 2\] .* found float16"),
    ],
)
def test_parts_of_wrong_shapes_and_dtypes_are_refused(suffix: str, part: torch.Tensor, message: str) -> None:
    parts = mlx_parts(*_affine(4, 64, 32, 4, torch.float32), 4) | {suffix: part}
    with pytest.raises(CheckpointError, match=f"model.safetensors: layer: {message}"):
        Mlx().check(linear_of((4, 64), parts))


def test_affine_codes_without_biases_are_refused() -> None:
    parts = mlx_parts(*_affine(4, 64, 32, 4, torch.float32), 4)
    del parts["biases"]
    with pytest.raises(CheckpointError, match=r"scales must be uint8 \[4, 2\] .* found float32"):
        Mlx().check(linear_of((4, 64), parts))


def test_values_that_are_not_finite_are_refused() -> None:
    encoding, parts = Mlx(), mlx_parts(*_affine(4, 64, 32, 4, torch.float16), 4)
    parts["biases"][3, 1] = torch.nan
    with pytest.raises(CheckpointError, match="layer: biases must be finite; found nan"):
        encoding.dequantize(linear_of((4, 64), parts), parts)
    codes = np.zeros((4, 64), dtype=np.int64)
    for bits, stored, suffix in ((4, 255, "scales"), (8, 255, "scales")):
        parts = mlx_parts(codes, torch.full((4, 2), stored, dtype=torch.uint8), None, bits)
        with pytest.raises(CheckpointError, match=f"layer: {suffix} must be finite; found nan"):
            encoding.dequantize(linear_of((4, 64), parts), parts)
    codes[1, 1] = 127
    parts = mlx_parts(codes, torch.full((4, 2), 120, dtype=torch.uint8), None, 8)
    with pytest.raises(CheckpointError, match="layer: weight must be finite; found nan"):
        encoding.dequantize(linear_of((4, 64), parts), parts)
