"""`ExportRecord`: what an export has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LAYOUTS", "ExportRecord"]

LAYOUTS = ("gguf", "mlx", "transformers")
"""The layouts that are written."""


@dataclass(frozen=True)
class ExportRecord:
    """The result of an export."""

    layout: str
    """"gguf", "mlx" or "transformers"."""
    files: tuple[str, ...]
    """Names of the files that hold weights, in order."""
    nbytes: int
    """Bytes of all tensors."""
    parameters: int
    """Weights of the model."""
    bytes_by_type: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the tensors of each type or dtype."""
    seconds: float = 0.0
    """Seconds that it took, without a quantization before it."""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all tensors."""
        return 8 * self.nbytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `dbrx-q export --json` prints."""
        return {
            "layout": self.layout,
            "files": list(self.files),
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "bytes_by_type": dict(self.bytes_by_type),
            "seconds": self.seconds,
        }
