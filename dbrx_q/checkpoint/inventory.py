"""Counts, formats and bytes of a checkpoint's tensors, by kind of tensor; read from the headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .layout import KINDS, kind_of
from .stored_weights import StoredWeights

__all__ = ["Inventory", "KindTotal", "take_inventory"]


@dataclass
class KindTotal:
    """Totals of the tensors of one kind."""

    count: int = 0
    """Tensors of the plain model."""
    format: str = ""
    """Their format, such as "int4:64"; several are joined by " + "."""
    parameters: int = 0
    """Elements of these tensors."""
    bytes: int = 0
    """Bytes as stored, with scales and zero-points."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class Inventory:
    """Totals of a checkpoint; headers are not counted."""

    kinds: dict[str, KindTotal] = field(default_factory=dict)
    """Totals by kind of tensor."""
    total: KindTotal = field(default_factory=KindTotal)
    """Totals of all kinds together; without a format."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q inspect --json`."""
        kinds = {name: asdict(row) | {"bits_per_weight": row.bits_per_weight} for name, row in self.kinds.items()}
        total = self.total
        return {"parameters": total.parameters, "bytes": total.bytes, "bits_per_weight": total.bits_per_weight, "kinds": kinds}


def take_inventory(weights: StoredWeights) -> Inventory:
    """Count every tensor of a checkpoint."""
    inventory = Inventory({kind: KindTotal() for kind in KINDS})
    formats: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for tensor in weights.tensors.values():
        kind, label = kind_of(tensor.name), weights.label_of(tensor.name)
        if label not in formats[kind]:
            formats[kind].append(label)
        for row in (inventory.kinds[kind], inventory.total):
            row.count += 1
            row.parameters += math.prod(tensor.shape)
            row.bytes += weights.nbytes_of(tensor.name)
    for kind, labels in formats.items():
        inventory.kinds[kind].format = " + ".join(labels)
    return inventory
