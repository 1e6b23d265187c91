"""AWQ layers: values by the formula, exact repacking, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.encodings.awq import Awq
from dbrx_q.sources.encodings.base import LoadedParts

from .stored import awq_parts, linear_of

_CONFIG = {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4, "version": "gemm"}


def _random(N: int, K: int, G: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [N, K], zeros [n, N] and scales [n, N], of which some are negative and one is 0."""
    rng = np.random.default_rng(K + G)
    scales = (rng.normal(size=(K // G, N)) / 100).astype(np.float16)
    scales[0, 0] = 0
    return rng.integers(0, 16, (N, K)), rng.integers(0, 16, (K // G, N)), scales


@pytest.mark.parametrize(
    ("N", "K", "G", "exact"),
    [(8, 64, 32, 32), (24, 192, 64, 64), (16, 256, 128, 128), (16, 256, 256, 128), (40, 96, 96, 32), (16, 64, 16, None), (16, 40, 8, None)],
)
@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16])
def test_values_and_repacked_values_are_those_of_the_formula(N: int, K: int, G: int, exact: int | None, scales_dtype: torch.dtype) -> None:
    codes, zeros, scales = _random(N, K, G)
    parts = awq_parts(codes, zeros, scales)
    parts["scales"] = parts["scales"].to(scales_dtype)
    encoding, linear = Awq(_CONFIG, "config.json"), linear_of((N, K), parts)
    encoding.check(linear)
    expected = np.zeros((N, K), dtype=np.float32)
    for j in range(N):
        for k in range(K):
            expected[j, k] = np.float32(parts["scales"][k // G, j].item()) * np.float32(int(codes[j, k]) - int(zeros[k // G, j]))
    bits = torch.from_numpy(expected).view(torch.int32)
    assert torch.equal(encoding.dequantize(linear, parts).view(torch.int32), bits)
    for first, count in ((0, N), (3, 2), (5, N - 5), (7, 1)):
        rows = encoding.read_rows(linear, LoadedParts(parts), first, count)
        assert torch.equal(rows.view(torch.int32), bits[first : first + count])
    assert encoding.label(linear) == f"AWQ int4:{G}"
    fmt = encoding.exact_format(linear)
    assert fmt == (None if exact is None or scales_dtype != torch.float16 else TensorFormat("int4", exact))
    if fmt is not None:
        packed = encoding.repack(linear, parts)
        assert [(part.dtype, tuple(part.shape), part.is_contiguous()) for part in packed.parts.values()] == [
            (part.dtype, part.shape, True) for part in fmt.parts(N, K)
        ]
        assert torch.equal(dequantize(packed).view(torch.int32), bits)


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        (
            "qweight",
            torch.zeros(8, 64, dtype=torch.int32),
            r"qweight must be int32 \[64, 2\] for a weight \[16, 64\]; found int32 \[8, 64\]",
        ),
        ("qzeros", torch.zeros(1, 2, dtype=torch.int32), r"qzeros must be int32 \[2, 2\]"),
        ("scales", torch.zeros(3, 16, dtype=torch.float16), r"scales must have a row for each group of the 64 inputs; found \[3, 16\]"),
        ("scales", torch.zeros(2, 8, dtype=torch.float16), r"scales must be bfloat16 or float16 or float32 \[2, 16\]"),
    ],
)
def test_parts_of_wrong_shapes_and_dtypes_are_refused(suffix: str, part: torch.Tensor, message: str) -> None:
    parts = awq_parts(*_random(16, 64, 32)) | {suffix: part}
    with pytest.raises(CheckpointError, match=f"model.safetensors: layer: {message}"):
        Awq(_CONFIG, "config.json").check(linear_of((16, 64), parts))


def test_layers_that_fill_no_word_are_refused() -> None:
    parts = awq_parts(*_random(16, 64, 32))
    with pytest.raises(CheckpointError, match="must have a multiple of 8 outputs; found 12"):
        Awq(_CONFIG, "config.json").check(linear_of((12, 64), parts))
    with pytest.raises(CheckpointError, match="must have a multiple of 8 inputs; found 60"):
        Awq(_CONFIG, "config.json").check(linear_of((16, 60), parts))


def test_scales_that_are_not_finite_are_refused() -> None:
    parts = awq_parts(*_random(16, 64, 32))
    parts["scales"][1, 2] = torch.inf
    encoding, linear = Awq(_CONFIG, "config.json"), linear_of((16, 64), parts)
    for read in (encoding.dequantize, encoding.repack):
        with pytest.raises(CheckpointError, match="layer: scales must be finite; found inf"):
            read(linear, parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "must have the version gemm; found 'gemv'"),
        ({"version": "gemv_fast"}, "must have the version gemm; found 'gemv_fast'"),
        ({"version": "marlin"}, "must have the version gemm; found 'marlin'"),
        ({"version": "exllama"}, "must have the version gemm; found 'exllama'"),
        ({"backend": "llm-awq"}, "must have the version gemm; found 'llm-awq'"),
        ({"bits": 3}, "must have 4 bits; found 3"),
        ({"zero_point": False}, "must have zero_point; found False"),
    ],
)
def test_other_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json: an AWQ checkpoint {message}. Quantize the original weights again with AutoAWQ"
    ):
        Awq(_CONFIG | changes, "config.json")


def test_older_configurations_are_read() -> None:
    """AutoAWQ's own names, and GPTQModel's."""
    Awq({"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}, "config.json")
    Awq({"bits": 4, "group_size": 128, "checkpoint_format": "gemm"}, "config.json")
