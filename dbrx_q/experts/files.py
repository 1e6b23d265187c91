"""Where each expert is stored on disk.

A quantized checkpoint stores an expert's w1, v1 and w2 next to each other: one contiguous range of one file. A plain checkpoint stacks the
experts of a layer matrix by matrix: three ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import EXPERT_MATRICES, expert_name
from dbrx_q.planning.expert_kinds import ExpertKind, expert_kinds

__all__ = ["ExpertFiles", "Extent"]


@dataclass(frozen=True)
class Extent:
    """A contiguous range of a file that holds an expert, or some of its stored parts."""

    path: Path
    """The file."""
    offset: int
    """The first byte."""
    nbytes: int
    """How many bytes."""
    parts: int
    """How many stored parts, in order, the range holds."""


class ExpertFiles:
    """Where the experts of a checkpoint folder are stored.

    Args:
        checkpoint: must be open; not needed afterwards.
        dtype: of plain experts in memory.

    Attributes:
        kinds: the kind of every layer's experts.
        n_experts: experts of each layer.
        paths: the files that hold experts.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        plain = {name: checkpoint.infos[name].dtype for name, tensor in checkpoint.tensors.items() if name not in checkpoint.formats}
        self.kinds: list[ExpertKind] = expert_kinds(config, checkpoint.formats, dtype, plain)
        self.n_experts = config.ffn_config.moe_num_experts
        self._extents = {
            (layer, e): _merged(_extents_of_parts(checkpoint, kind, layer, e))
            for layer, kind in enumerate(self.kinds)
            for e in range(self.n_experts)
        }
        self.paths = sorted({extent.path for extents in self._extents.values() for extent in extents})

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """The ranges of an expert's stored parts, in the order of the parts."""
        return self._extents[layer, expert]

    @property
    def nbytes(self) -> int:
        """Bytes of all experts on disk."""
        return sum(kind.stored_nbytes for kind in self.kinds) * self.n_experts


def _extents_of_parts(checkpoint: Checkpoint, kind: ExpertKind, layer: int, expert: int) -> list[Extent]:
    """One range for each stored part."""
    extents = []
    for matrix in EXPERT_MATRICES:
        for part in kind.stored:
            if part.matrix != matrix:
                continue
            name = expert_name(layer, matrix, expert, part.name)
            skipped = 0 if part.name else expert * part.nbytes
            extents.append(Extent(checkpoint.path_of(name), checkpoint.infos[name].offset + skipped, part.nbytes, 1))
    return extents


def _merged(extents: list[Extent]) -> list[Extent]:
    """The ranges with adjacent ones of the same file merged."""
    merged = extents[:1]
    for extent in extents[1:]:
        last = merged[-1]
        if extent.path == last.path and extent.offset == last.offset + last.nbytes:
            merged[-1] = Extent(last.path, last.offset, last.nbytes + extent.nbytes, last.parts + 1)
        else:
            merged.append(extent)
    return merged
