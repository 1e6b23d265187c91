"""Room for experts: stacks in which the matrices of any expert of one kind can lie.

Dimension letters: `S` slots, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..config import DbrxConfig
from ..host_memory import empty_host
from ..kernels.linear import Weight
from ..kernels.moe import ExpertWeights
from ..layout import DenseTensor, TensorFormat, dense_tensors, matrix_parts, pack_parts

__all__ = ["MATRICES", "SCRATCH_SLOTS", "ExpertKind", "ExpertPart", "ExpertSlots", "expert_kinds", "first_slots"]

MATRICES = ("w1", "v1", "w2")
SCRATCH_SLOTS = 2
"""Slots of a card that are left empty at first: where every expert lies in one memory only, a card can give up none but what it copied."""


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
                stored += [ExpertPart(matrix, part.name, part.dtype, part.shape) for part in matrix_parts(tensor, fmt)]
                parts += [ExpertPart(matrix, part.name, part.dtype, part.shape) for part in matrix_parts(tensor, fmt.in_memory)]
        kinds.append(ExpertKind(tuple(formats.get(tensor.name) for tensor in layer), tuple(stored), tuple(parts)))
    return kinds


def first_slots(slots: int, experts: int) -> int:
    """How many of a card's slots are filled at first, of those for one kind of which its layers have so many experts."""
    return slots if slots >= experts else max(0, slots - SCRATCH_SLOTS)


class ExpertSlots:
    """Memory for S experts of one kind.

    Args:
        kind: of all that will lie here.
        count: S.
        device: where.

    Attributes:
        weights: the stacks as kernels take them, without a map of slots.
    """

    def __init__(self, kind: ExpertKind, count: int, device: torch.device) -> None:
        self.kind, self.count = kind, count
        on_host = device.type == "cpu"
        self._stacks = [
            empty_host((count, *part.shape), part.dtype) if on_host else torch.empty((count, *part.shape), dtype=part.dtype, device=device)
            for part in kind.parts
        ]
        self._views: dict[int, list[torch.Tensor]] = {}  # which are asked for in every layer of every token
        w1, v1, w2 = (self._matrix(matrix, fmt) for matrix, fmt in zip(MATRICES, kind.formats, strict=True))
        self.weights = ExpertWeights(w1, v1, w2.transpose(1, 2) if isinstance(w2, torch.Tensor) else w2)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(stack.nbytes for stack in self._stacks)

    def views(self, slot: int) -> list[torch.Tensor]:
        """The pieces of one slot, in the order of `kind.parts`."""
        if slot not in self._views:
            self._views[slot] = [stack[slot] for stack in self._stacks]
        return self._views[slot]

    def put(self, slot: int, stored: list[torch.Tensor]) -> None:
        """Bring the pieces of an expert as they are stored, in the order of `kind.stored`, into a slot as kernels want them."""
        views = iter(self.views(slot))
        for matrix, fmt in zip(MATRICES, self.kind.formats, strict=True):
            own = {part.name: piece for part, piece in zip(self.kind.stored, stored, strict=True) if part.matrix == matrix}
            if fmt is None:
                next(views).copy_(own[""])
                continue
            packed = pack_parts(own, fmt)
            for part in self.kind.parts:
                if part.matrix == matrix:
                    next(views).copy_(getattr(packed, part.name))

    def _matrix(self, matrix: str, fmt: TensorFormat | None) -> Weight:
        own = {part.name: stack for part, stack in zip(self.kind.parts, self._stacks, strict=True) if part.matrix == matrix}
        return own[""] if fmt is None else pack_parts(own, fmt.in_memory)
