"""How one expert of every layer is laid out on disk and in memory.

Dimension letters: `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors
from dbrx_q.config import DbrxConfig

__all__ = ["MATRICES", "ExpertKind", "ExpertPart", "expert_kinds"]


MATRICES = ("w1", "v1", "w2")


@dataclass(frozen=True)
class ExpertPart:
    """A piece of one expert. matrix: one of w1, v1, w2. name: its last name, "" where it is the plain matrix [F, D]."""

    matrix: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertKind:
    """How the experts of a layer lie on disk and in memory; those that lie alike in memory can take each other's place.

    formats: of w1, v1 and w2 as stored, None for plain ones. stored: the pieces on disk, in their order there. parts: those in memory.
    """

    formats: tuple[TensorFormat | None, ...]
    stored: tuple[ExpertPart, ...] = field(compare=False)
    parts: tuple[ExpertPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert in memory."""
        return sum(part.nbytes for part in self.parts)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of one expert on disk."""
        return sum(part.nbytes for part in self.stored)

    @property
    def as_stored(self) -> bool:
        """Whether the bytes on disk are those in memory."""
        return self.stored == self.parts


def expert_kinds(
    config: DbrxConfig, formats: Mapping[str, TensorFormat], dtype: torch.dtype, stored_dtypes: Mapping[str, torch.dtype] | None = None
) -> list[ExpertKind]:
    """The kind of every layer's experts.

    Args:
        config: of the model.
        formats: of its packed tensors, by their plain names.
        dtype: of plain experts in memory.
        stored_dtypes: of plain expert tensors on disk, by name; the same without.
    """
    tensors: list[list[DenseTensor]] = [[] for _ in range(config.n_layers)]
    for tensor in dense_tensors(config):
        if tensor.experts:
            tensors[tensor.layer].append(tensor)
    kinds = []
    for layer in tensors:
        stored: list[ExpertPart] = []
        parts: list[ExpertPart] = []
        for matrix, tensor in zip(MATRICES, layer, strict=True):
            fmt = formats.get(tensor.name)
            if fmt is None:
                shape = tensor.shape[0] // tensor.experts, tensor.shape[1]
                stored.append(ExpertPart(matrix, "", (stored_dtypes or {}).get(tensor.name, dtype), shape))
                parts.append(ExpertPart(matrix, "", dtype, shape))
            else:
                stored += [ExpertPart(matrix, part.name, part.dtype, part.shape) for part in fmt.parts(*tensor.matrix)]
                parts += [ExpertPart(matrix, part.name, part.dtype, part.shape) for part in fmt.in_memory.parts(*tensor.matrix)]
        kinds.append(ExpertKind(tuple(formats.get(tensor.name) for tensor in layer), tuple(stored), tuple(parts)))
    return kinds
