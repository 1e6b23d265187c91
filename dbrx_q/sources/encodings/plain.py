"""`Plain`: a weight [N, K] that is stored as it is, in bfloat16, float16 or float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .base import Encoding, Parts, StoredLinear

__all__ = ["FLOATS", "Plain"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of plain weights and of scales."""


class Plain(Encoding):
    """One part, `weight`, a float [N, K]; no format of ours holds its values exactly."""

    suffixes = frozenset({"weight"})

    def check(self, linear: StoredLinear) -> None:
        linear.expect("weight", linear.shape, *FLOATS)

    def label(self, linear: StoredLinear) -> str:
        return linear.parts["weight"].dtype_label

    def dtype(self, linear: StoredLinear) -> torch.dtype:
        return linear.parts["weight"].dtype

    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        return None

    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        linear.check_finite("weight", parts["weight"])
        return parts["weight"]

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        return self.dequantize(linear, {"weight": parts.rows("weight", first, count)})

    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        raise AssertionError("a plain weight has no exact format")
