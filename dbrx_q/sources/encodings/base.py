"""`Encoding`: how a program stores the weight of one linear layer in a safetensors file.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.safetensors_file import TensorInfo
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

__all__ = ["NO_KEEP", "Encoding", "LoadedParts", "Parts", "StoredLinear"]

NO_KEEP = "Quantize it without --keep, which rounds it again"
"""What to do about a weight whose data have no exact format, though its headers promise one."""


@dataclass(frozen=True)
class StoredLinear:
    """The weight [N, K] of one linear layer in a file: what headers say about it."""

    module: str
    """The name of the layer, before the suffixes of its parts, such as `transformer.blocks.0.norm_attn_norm.attn.Wqkv`."""
    shape: tuple[int, int]
    """[N, K] by config.json."""
    parts: Mapping[str, TensorInfo]
    """The stored tensors by their suffixes, such as "weight" or "qweight"."""
    path: Path
    """The file that holds them, for messages."""

    def wrong(self, rule: str, found: object, next_step: str = "Fetch the checkpoint again") -> CheckpointError:
        """The error for a part that breaks a rule."""
        return CheckpointError(f"{self.path}: {self.module}: {rule}; found {found}. {next_step}")

    def expect(self, suffix: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Refuse a part that is not of this shape and one of these dtypes.

        Raises:
            CheckpointError: names the file, the layer, the rule and what was found.
        """
        info = self.parts[suffix]
        if info.shape != shape or not info.has_dtype(*dtypes):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.wrong(
                f"{suffix} must be {names} {list(shape)} for a weight {list(self.shape)}", f"{info.dtype_label} {list(info.shape)}"
            )

    def check_finite(self, suffix: str, part: torch.Tensor) -> None:
        """Refuse a part with NaN or infinite values.

        Raises:
            CheckpointError: names the file, the layer and the value.
        """
        if not torch.isfinite(part.sum(dtype=torch.float32)) and not (finite := torch.isfinite(part)).all():
            raise self.wrong(f"{suffix} must be finite", part[~finite][0].item())


class Parts(Protocol):
    """The stored parts of one weight, read when they are asked for, by their suffixes."""

    def whole(self, suffix: str) -> torch.Tensor:
        """A part."""

    def rows(self, suffix: str, first: int, count: int) -> torch.Tensor:
        """Rows of a part, which are neighbours in the file; elements of one with a single axis."""


class LoadedParts:
    """`Parts` that are in memory."""

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        self._parts = parts

    def whole(self, suffix: str) -> torch.Tensor:
        return self._parts[suffix]

    def rows(self, suffix: str, first: int, count: int) -> torch.Tensor:
        return self._parts[suffix][first : first + count]


class Encoding(ABC):
    """How one program stores weights [N, K]; made once for a checkpoint, from what config.json says about its quantization."""

    suffixes: frozenset[str]
    """Of the parts that every weight has."""
    optional: frozenset[str] = frozenset()
    """Of the parts that a weight may have beside them."""

    @abstractmethod
    def check(self, linear: StoredLinear) -> None:
        """Refuse parts of other shapes or dtypes than the encoding's.

        Raises:
            CheckpointError: names the file, the layer, the rule and what was found.
        """

    def check_statistics(self, linear: StoredLinear, parts: Parts) -> None:  # noqa: B027 # most have nothing to check
        """Refuse a small part whose contents contradict the headers; called where the files are on this machine.

        Raises:
            CheckpointError: names the file, the layer, the rule and what was found.
        """

    @abstractmethod
    def label(self, linear: StoredLinear) -> str:
        """The program and its format, such as "GPTQ int4:128"."""

    @abstractmethod
    def dtype(self, linear: StoredLinear) -> torch.dtype:
        """The dtype of what `dequantize` returns."""

    @abstractmethod
    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        """The format that holds the values of a checked weight exactly, by the headers; None where there is none."""

    @abstractmethod
    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [N, K], from the parts as stored.

        Raises:
            CheckpointError: a value is NaN or infinite, or an index is out of its range.
        """

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of `dequantize`; an encoding that stores row after row reads no others."""
        return self.dequantize(linear, {suffix: parts.whole(suffix) for suffix in linear.parts})[first : first + count]

    @abstractmethod
    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight in its `exact_format`: its dequantized float32 values have the bits of `dequantize`.

        Raises:
            CheckpointError: the parts are not as the headers promised, such as an order of columns that is none.
        """
