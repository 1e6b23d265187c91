"""Memory for experts: stacks of slots, each of which holds the matrices of any expert of one kind.

Dimension letters: `S` slots.
"""

from __future__ import annotations

import torch

from dbrx_q.checkpoint.layout import EXPERT_MATRICES, TensorFormat, expert_weights
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.host_memory import empty_host

__all__ = ["ExpertSlots"]


class ExpertSlots:
    """Memory for S experts of one kind.

    Args:
        kind: of all experts that the slots hold.
        count: S.
        device: of the memory.

    Attributes:
        weights: the stacks in the form that kernels take, without a map from experts to slots.
    """

    def __init__(self, kind: ExpertKind, count: int, device: torch.device) -> None:
        self.kind, self.count = kind, count
        on_host = device.type == "cpu"
        self._stacks = [
            empty_host((count, *part.shape), part.dtype) if on_host else torch.empty((count, *part.shape), dtype=part.dtype, device=device)
            for part in kind.parts
        ]
        self._views: dict[int, list[torch.Tensor]] = {}  # kept, since every layer of every token asks for some
        matrices = zip(EXPERT_MATRICES, kind.formats, strict=True)
        self.weights = expert_weights({matrix: self._matrix(matrix, fmt) for matrix, fmt in matrices})

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(stack.nbytes for stack in self._stacks)

    def views(self, slot: int) -> list[torch.Tensor]:
        """The parts of one slot, in the order of `kind.parts`."""
        if slot not in self._views:
            self._views[slot] = [stack[slot] for stack in self._stacks]
        return self._views[slot]

    def put(self, slot: int, stored: list[torch.Tensor]) -> None:
        """Copy an expert into a slot: from its parts as stored, in the order of `kind.stored`, to the form that kernels take."""
        views = iter(self.views(slot))
        for matrix, fmt in zip(EXPERT_MATRICES, self.kind.formats, strict=True):
            pieces = {part.name: piece for part, piece in zip(self.kind.stored, stored, strict=True) if part.matrix == matrix}
            if fmt is None:
                next(views).copy_(pieces[""])
                continue
            loaded = fmt.load(pieces).parts
            for part in self.kind.parts:
                if part.matrix == matrix:
                    next(views).copy_(loaded[part.name])

    def _matrix(self, matrix: str, fmt: TensorFormat | None) -> Weight:
        stacks = {part.name: stack for part, stack in zip(self.kind.parts, self._stacks, strict=True) if part.matrix == matrix}
        return stacks[""] if fmt is None else fmt.in_memory.load(stacks)
