"""GPTQ layers: values by the formula, exact repacking, and refusals."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.encodings.base import LoadedParts
from dbrx_q.sources.encodings.gptq import Gptq

from .stored import gptq_parts, linear_of

_ASYMMETRIC = {"quant_method": "gptq", "sym": False, "desc_act": False, "checkpoint_format": "gptq"}


def _encoding(**changes: Any) -> Gptq:
    return Gptq(_ASYMMETRIC | changes, "config.json")


def _random(N: int, K: int, G: int, bits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [N, K], zeros [n, N] and scales [n, N], of which one is negative and one 0."""
    rng = np.random.default_rng(seed)
    n = -(-K // G)
    scales = (rng.normal(size=(n, N)) / 100).astype(np.float16)
    scales[0, 0] = 0
    return rng.integers(0, 2**bits, (N, K)), rng.integers(0, 2**bits, (n, N)), scales


def _values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray) -> torch.Tensor:
    """The formula, element by element in float32."""
    N, K = codes.shape
    values = np.zeros((N, K), dtype=np.float32)
    for j in range(N):
        for k in range(K):
            g = g_idx[k]
            values[j, k] = np.float32(scales[g, j]) * np.float32(int(codes[j, k]) - int(zeros[g, j]))
    return torch.from_numpy(values)


_SHAPES = (
    # N, K, config's group size, exact group
    (32, 128, 64, 64),
    (32, 192, 32, 32),
    (64, 256, 128, 128),
    (32, 256, 256, 128),
    (32, 384, -1, 128),
    (32, 192, -1, 64),
    (32, 96, -1, 32),
    (32, 192, 128, 64),  # the last group is smaller
    (32, 64, 128, 64),
    (32, 64, 16, None),
)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K", "group_size", "exact"), _SHAPES)
@pytest.mark.parametrize("version", [1, 2])
def test_values_and_repacked_values_are_those_of_the_formula(
    N: int, K: int, group_size: int, exact: int | None, bits: int, version: int
) -> None:
    G = K if group_size < 0 else group_size
    codes, zeros, scales = _random(N, K, G, bits, seed=K + bits)
    if bits == 8:
        zeros[:] = 128
    parts = gptq_parts(codes, zeros, scales, bits, version=version, g_idx=np.arange(K) // G)
    encoding = _encoding(group_size=group_size, sym=bits == 8, checkpoint_format="gptq" if version == 1 else "gptq_v2")
    linear = linear_of((N, K), parts)
    encoding.check(linear)
    values = encoding.dequantize(linear, parts)
    assert values.dtype == encoding.dtype(linear) == torch.float32
    expected = _values(codes, zeros, scales, np.arange(K) // G)
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
    rows = encoding.read_rows(linear, LoadedParts(parts), 5, 19)
    assert torch.equal(rows.view(torch.int32), expected[5:24].view(torch.int32))
    fmt = encoding.exact_format(linear)
    assert fmt == (None if exact is None else TensorFormat("int8" if bits == 8 else "int4", exact))
    if fmt is not None:
        packed = encoding.repack(linear, parts)
        assert (packed.format, packed.group_size, packed.shape) == (fmt.format, fmt.group_size, (N, K))
        assert [(part.dtype, tuple(part.shape), part.is_contiguous()) for part in packed.parts.values()] == [
            (part.dtype, part.shape, True) for part in fmt.parts(N, K)
        ]
        assert torch.equal(dequantize(packed).view(torch.int32), expected.view(torch.int32))


def test_act_order_is_dequantized_and_has_no_exact_format() -> None:
    codes, zeros, scales = _random(32, 128, 32, 4)
    g_idx = np.random.default_rng(1).permutation(np.arange(128) // 32)
    parts = gptq_parts(codes, zeros, scales, 4, g_idx=g_idx)
    linear = linear_of((32, 128), parts)
    encoding = _encoding(group_size=32, desc_act=True)
    assert torch.equal(encoding.dequantize(linear, parts), _values(codes, zeros, scales, g_idx))
    assert encoding.exact_format(linear) is None
    assert encoding.label(linear) == "GPTQ int4:32 act-order"
    static = _encoding(group_size=32, desc_act=True, static_groups=True)
    assert static.exact_format(linear) == TensorFormat("int4", 32)
    with pytest.raises(CheckpointError, match=r"groups of neighbours, because desc_act is false .* Quantize it without --keep"):
        static.repack(linear, parts)


def test_act_order_without_g_idx_is_refused() -> None:
    """Without it the groups of the inputs are unknown; only a single group has none to tell apart."""
    for G, refused in ((32, True), (128, False)):
        linear = linear_of((32, 128), gptq_parts(*_random(32, 128, G, 4), 4))
        _encoding(group_size=G).check(linear)
        with pytest.raises(CheckpointError, match=r"must have g_idx, .*found none") if refused else nullcontext():
            _encoding(group_size=G, desc_act=True).check(linear)


def test_groups_are_those_of_the_shapes_without_g_idx() -> None:
    """As GPTQModel's `dynamic` gives a module other groups than the configuration's."""
    codes, zeros, scales = _random(32, 128, 64, 4)
    parts = gptq_parts(codes, zeros, scales, 4)
    linear = linear_of((32, 128), parts)
    encoding = _encoding(group_size=128)
    assert encoding.label(linear) == "GPTQ int4:64"
    assert torch.equal(encoding.dequantize(linear, parts), _values(codes, zeros, scales, np.arange(128) // 64))


def test_zero_points_that_gptqmodel_subtracted_by_words() -> None:
    """A zero-point 0 borrows 1 from the field above it, which AutoGPTQ's reader would not give back."""
    codes, zeros, scales = _random(32, 64, 32, 4)
    zeros[:, 3::5] = 0
    parts = gptq_parts(codes, zeros, scales, 4, version=2)
    parts["qzeros"] -= 0x11111111
    linear = linear_of((32, 64), parts)
    expected = _values(codes, zeros, scales, np.arange(64) // 32)
    by_words = _encoding(group_size=32, meta={"quantizer": ["gptqmodel:7.7.0"]})
    assert torch.equal(by_words.dequantize(linear, parts), expected)
    assert torch.equal(dequantize(by_words.repack(linear, parts)), expected)
    assert not torch.equal(_encoding(group_size=32).dequantize(linear, parts), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_that_float16_may_not_hold_have_no_exact_format(dtype: torch.dtype) -> None:
    codes, zeros, scales = _random(32, 64, 32, 4)
    parts = gptq_parts(codes, zeros, scales, 4)
    parts["scales"] = parts["scales"].to(dtype)
    linear = linear_of((32, 64), parts)
    encoding = _encoding(group_size=32)
    encoding.check(linear)
    assert encoding.exact_format(linear) is None
    assert torch.equal(encoding.dequantize(linear, parts), _values(codes, zeros, parts["scales"].float().numpy(), np.arange(64) // 32))


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, None),
        ({"sym": True}, TensorFormat("int8", 32)),
        ({"sym": True, "dynamic": {"+:.*w2": {"sym": False}}}, None),
        ({"sym": True, "dynamic": {"+:.*w2": {"desc_act": True}, "-:.*router": {}}}, None),
        ({"sym": True, "dynamic": {"+:.*w2": {"bits": 4}}}, TensorFormat("int8", 32)),
        ({"sym": True, "desc_act": True}, None),
    ],
)
def test_the_exact_format_of_8_bits_follows_the_configuration(changes: dict[str, Any], exact: TensorFormat | None) -> None:
    codes, zeros, scales = _random(32, 64, 32, 8)
    linear = linear_of((32, 64), gptq_parts(codes, zeros, scales, 8))
    assert _encoding(**changes).exact_format(linear) == exact


def _broken(suffix: str, part: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = gptq_parts(*_random(32, 64, 32, 4), 4, g_idx=np.arange(64) // 32)
    return parts | {"bias": torch.zeros(32, dtype=torch.float16)} | ({} if part is None else {suffix: part})


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        (
            "qweight",
            torch.zeros(9, 32, dtype=torch.int32),
            r"qweight must be \[4, 32\] or .* in 2, 3, 4, 8 bits; found \[9, 32\]. Quantize",
        ),
        ("qweight", torch.zeros(8, 32, dtype=torch.int64), r"qweight must be int32 \[8, 32\] for a weight \[32, 64\]; found int64"),
        ("qzeros", torch.zeros(2, 8, dtype=torch.int32), r"qzeros must be int32 \[2, 4\]"),
        ("scales", torch.zeros(3, 32, dtype=torch.float16), r"scales must have a row for each group of the 64 inputs; found \[3, 32\]"),
        ("scales", torch.zeros((), dtype=torch.float16), r"scales must have a row for each group"),
        ("scales", torch.zeros(2, 16, dtype=torch.float16), r"scales must be bfloat16 or float16 or float32 \[2, 32\]"),
        ("scales", torch.zeros(2, 32, dtype=torch.int8), r"scales must be bfloat16 .* found int8"),
        ("g_idx", torch.zeros(32, dtype=torch.int32), r"g_idx must be int32 or int64 \[64\]"),
        ("bias", torch.zeros(64), r"bias must be .* \[32\]"),
    ],
)
def test_parts_of_wrong_shapes_and_dtypes_are_refused(suffix: str, part: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors: layer: {message}"):
        _encoding(group_size=32).check(linear_of((32, 64), _broken(suffix, part)))


def test_outputs_whose_zero_points_fill_no_word_are_refused() -> None:
    parts = gptq_parts(*_random(32, 64, 32, 3), 3)
    parts = {suffix: part[:, : 16 if suffix != "qzeros" else None].contiguous() for suffix, part in parts.items()}
    with pytest.raises(CheckpointError, match="outputs must be a multiple of 32, so that zero-points fill whole words; found 16"):
        _encoding().check(linear_of((16, 64), parts))


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        ("g_idx", torch.full((64,), 2, dtype=torch.int32), r"g_idx must be from 0 to 1; found \[2, 2\]"),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), r"g_idx must be from 0 to 1; found \[-1, -1\]"),
        ("scales", torch.full((2, 32), torch.nan, dtype=torch.float16), "scales must be finite; found nan"),
        ("bias", torch.full((32,), 0.5), "bias must be zero in a DBRX; found 0.5"),
    ],
)
def test_broken_data_are_refused(suffix: str, part: torch.Tensor, message: str) -> None:
    parts = _broken(suffix, part)
    linear = linear_of((32, 64), parts)
    encoding = _encoding(group_size=32)
    with pytest.raises(CheckpointError, match=message):
        encoding.dequantize(linear, parts)
    with pytest.raises(CheckpointError, match="without --keep" if suffix == "g_idx" else message):
        encoding.repack(linear, parts)
    with pytest.raises(CheckpointError, match=message) if suffix == "bias" else nullcontext():  # before anything is written
        encoding.check_statistics(linear, LoadedParts(parts))


def test_a_symmetric_file_with_other_zero_points_is_not_repacked() -> None:
    codes, zeros, scales = _random(32, 64, 32, 8)
    zeros[:] = 128
    zeros[1, 7] = 127
    parts = gptq_parts(codes, zeros, scales, 8)
    with pytest.raises(
        CheckpointError, match=r"8-bit zero-points must be 128, because sym is true .*; found 127. Quantize it without --keep"
    ):
        _encoding(sym=True).repack(linear_of((32, 64), parts), parts)


@pytest.mark.parametrize("changes", [{"checkpoint_format": "marlin"}, {"checkpoint_format": "gptq_p"}, {"is_marlin_format": True}])
def test_other_layouts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .* checkpoint_format gptq or gptq_v2; found '.*'. Quantize the original"):
        _encoding(**changes)
