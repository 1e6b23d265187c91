"""Plain weights."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.errors import CheckpointError
from dbrx_q.sources.encodings.base import LoadedParts
from dbrx_q.sources.encodings.plain import Plain

from .stored import linear_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_weight_is_read_as_it_is(dtype: torch.dtype) -> None:
    parts = {"weight": torch.randn(6, 40).to(dtype)}
    encoding, linear = Plain(), linear_of((6, 40), parts)
    encoding.check(linear)
    assert encoding.dtype(linear) == dtype
    assert encoding.label(linear) == str(dtype).removeprefix("torch.")
    assert encoding.exact_format(linear) is None
    assert torch.equal(encoding.dequantize(linear, parts), parts["weight"])
    assert torch.equal(encoding.read_rows(linear, LoadedParts(parts), 2, 3), parts["weight"][2:5])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            torch.zeros(6, 32),
            r"weight must be bfloat16 or float16 or float32 \[6, 40\] .* found float32 \[6, 32\]. Fetch the checkpoint again",
        ),
        (torch.zeros(6, 40, dtype=torch.float8_e4m3fn), r"weight must be bfloat16 or .* found float8_e4m3fn \[6, 40\]"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors: layer: {message}"):
        Plain().check(linear_of((6, 40), {"weight": weight}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    parts = {"weight": torch.zeros(6, 40)}
    parts["weight"][5, 3] = value
    parts["weight"][0, 0] = 3e38
    parts["weight"][0, 1] = 3e38  # their sum alone is infinite
    with pytest.raises(CheckpointError, match=f"layer: weight must be finite; found {value}"):
        Plain().dequantize(linear_of((6, 40), parts), parts)
    parts["weight"][5, 3] = 0
    assert Plain().dequantize(linear_of((6, 40), parts), parts) is parts["weight"]
