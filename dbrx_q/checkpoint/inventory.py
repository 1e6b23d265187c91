"""What a checkpoint is made of, by kind of tensor; from its headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .folder import Checkpoint
from .layout import KINDS, kind_of, parts_of

__all__ = ["Inventory", "KindTotal", "take_inventory"]


@dataclass
class KindTotal:
    """count: tensors of the plain model. format: as "int4:64", several joined by " + ". bytes: with scales and zero-points."""

    count: int = 0
    format: str = ""
    parameters: int = 0
    bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class Inventory:
    """kinds: name to `KindTotal`. total: all of them; headers are not counted."""

    kinds: dict[str, KindTotal] = field(default_factory=dict)
    total: KindTotal = field(default_factory=KindTotal)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q inspect --json`."""
        kinds = {name: asdict(row) | {"bits_per_weight": row.bits_per_weight} for name, row in self.kinds.items()}
        total = self.total
        return {"parameters": total.parameters, "bytes": total.bytes, "bits_per_weight": total.bits_per_weight, "kinds": kinds}


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """Count every tensor of `checkpoint`."""
    inventory = Inventory({kind: KindTotal() for kind in KINDS})
    formats: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for tensor in checkpoint.tensors.values():
        fmt = checkpoint.formats.get(tensor.name)
        kind = kind_of(tensor.name)
        names = [tensor.name] if fmt is None else [part.name for part in parts_of(tensor, fmt)]
        label = checkpoint.infos[tensor.name].dtype_label if fmt is None else str(fmt)
        if label not in formats[kind]:
            formats[kind].append(label)
        for row in (inventory.kinds[kind], inventory.total):
            row.count += 1
            row.parameters += math.prod(tensor.shape)
            row.bytes += sum(checkpoint.infos[name].nbytes for name in names)
    for kind, labels in formats.items():
        inventory.kinds[kind].format = " + ".join(labels)
    return inventory
