"""`ExpertWeights`, the experts of a layer, and `Routing`, the decision of a router.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `S` slots, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .weights import Weight

__all__ = ["ExpertWeights", "Routing"]


@dataclass(frozen=True)
class ExpertWeights:
    """Experts of one layer in S slots, every matrix with its reduction axis last; S = E where all experts are resident."""

    w1: Weight
    """[S, F, D], the gate."""
    v1: Weight
    """[S, F, D], up."""
    w2: Weight
    """[S, D, F], down (the transpose of what a DBRX checkpoint stores)."""
    slots: torch.Tensor | None = None
    """int32 [E], the slot of every expert, -1 for an expert without one; None: expert e is in slot e."""

    @property
    def n_experts(self) -> int:
        """E, the experts that a router chooses from."""
        return self.w1.shape[0] if self.slots is None else self.slots.shape[0]


@dataclass(frozen=True)
class Routing:
    """The decision of a router."""

    logits: torch.Tensor
    """float32 [T, E], of all experts."""
    experts: torch.Tensor
    """int64 [T, A], the chosen experts, best first."""
    weights: torch.Tensor
    """float32 [T, A], the factors of their outputs."""
