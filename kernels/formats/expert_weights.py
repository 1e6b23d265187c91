"""The experts of a layer, and a router's choice among them.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `S` slots, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .weights import Weight

__all__ = ["ExpertWeights", "Routing"]


@dataclass(frozen=True)
class ExpertWeights:
    """Experts of one layer, every matrix with its reduction axis last. A matrix lies in one of S slots; S = E where all experts are here.

    w1: [S, F, D], the gate. v1: [S, F, D], up. w2: [S, D, F], down (the transpose of what a DBRX checkpoint stores).
    slots: int32 [E], the slot of every expert, -1 for one that is not here; None: expert e lies in slot e.
    """

    w1: Weight
    v1: Weight
    w2: Weight
    slots: torch.Tensor | None = None

    @property
    def n_experts(self) -> int:
        """E, the experts that a router chooses from."""
        return self.w1.shape[0] if self.slots is None else self.slots.shape[0]


@dataclass(frozen=True)
class Routing:
    """The router's decision. logits: float32 [T, E]. experts: int64 [T, A], best first. weights: float32 [T, A]."""

    logits: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
