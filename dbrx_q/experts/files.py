"""Where each expert lies on disk.

A quantized checkpoint keeps an expert's w1, v1 and w2 next to each other: one contiguous range of one file. A plain one has the experts of
a layer stacked matrix by matrix: three ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.planning.expert_kinds import MATRICES, ExpertKind, expert_kinds

__all__ = ["ExpertFiles", "Extent"]


@dataclass(frozen=True)
class Extent:
    """A contiguous range of the file `path`. offset, nbytes: the range. pieces: how many stored pieces, in order, it holds."""

    path: Path
    offset: int
    nbytes: int
    pieces: int


class ExpertFiles:
    """The experts of a checkpoint folder.

    Args:
        checkpoint: open; not needed afterwards.
        dtype: of plain experts in memory.

    Attributes:
        kinds: of every layer's experts.
        n_experts: of each layer.
        paths: the files that hold experts.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        plain = {name: checkpoint.infos[name].dtype for name, tensor in checkpoint.tensors.items() if name not in checkpoint.formats}
        self.kinds: list[ExpertKind] = expert_kinds(config, checkpoint.formats, dtype, plain)
        self.n_experts = config.ffn_config.moe_num_experts
        self._extents = {
            (layer, e): _merged(_places(checkpoint, kind, layer, e)) for layer, kind in enumerate(self.kinds) for e in range(self.n_experts)
        }
        self.paths = sorted({extent.path for extents in self._extents.values() for extent in extents})

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Where an expert's stored pieces lie, in their order."""
        return self._extents[layer, expert]

    @property
    def nbytes(self) -> int:
        """Bytes of all experts on disk."""
        return sum(kind.stored_nbytes for kind in self.kinds) * self.n_experts


def _places(checkpoint: Checkpoint, kind: ExpertKind, layer: int, expert: int) -> list[Extent]:
    """One for each stored piece."""
    found = []
    for matrix in MATRICES:
        tensor = f"transformer.blocks.{layer}.ffn.experts.mlp.{matrix}"
        for part in kind.stored:
            if part.matrix != matrix:
                continue
            name = f"{tensor}.{expert}.{part.name}" if part.name else tensor
            skipped = 0 if part.name else expert * part.nbytes
            found.append(Extent(checkpoint.path_of(name), checkpoint.infos[name].offset + skipped, part.nbytes, 1))
    return found


def _merged(places: list[Extent]) -> list[Extent]:
    """Neighbours that follow each other in one file, as one."""
    found = places[:1]
    for place in places[1:]:
        last = found[-1]
        if place.path == last.path and place.offset == last.offset + last.nbytes:
            found[-1] = Extent(last.path, last.offset, last.nbytes + place.nbytes, last.pieces + 1)
        else:
            found.append(place)
    return found
