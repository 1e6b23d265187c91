"""Room for experts: stacks in which the matrices of any expert of one kind can lie.

Dimension letters: `S` slots, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.planning.expert_kinds import MATRICES, ExpertKind
from dbrx_q.planning.host_memory import empty_host

__all__ = [
    "ExpertSlots",
]


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
            loaded = fmt.load(own).parts
            for part in self.kind.parts:
                if part.matrix == matrix:
                    next(views).copy_(loaded[part.name])

    def _matrix(self, matrix: str, fmt: TensorFormat | None) -> Weight:
        own = {part.name: stack for part, stack in zip(self.kind.parts, self._stacks, strict=True) if part.matrix == matrix}
        return own[""] if fmt is None else fmt.in_memory.load(own)
