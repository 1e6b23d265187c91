"""The interface of expert stores, and the one that holds everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.moe import moe_experts

from .stats import ExpertStats

__all__ = ["ExpertStore", "ResidentExpertStore"]


class ExpertStore(ABC):
    """Runs the experts of a layer, wherever they lie.

    Dimension letters: `T` tokens, `A` active experts of a token, `D` d_model.

    Attributes:
        renewed: whether a layer's weights are read or decoded again whenever it is reached, so that many tokens should go through at once.
    """

    reloads_each_step = False

    @abstractmethod
    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        """Weights of layer `index` in which every expert of `experts`, int64 [T, A], is present; valid until the next call."""

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """What the experts of layer `index` make of the tokens `x` [T, D]: [T, D] in their dtype."""
        return moe_experts(x, routing.experts, routing.weights, self.layer(index, routing.experts))

    def stats(self) -> ExpertStats:
        """What was asked for and what it took, since the model was loaded; zeros where all experts are at hand."""
        return ExpertStats()

    def close(self) -> None:  # noqa: B027 # most have nothing to give up
        """Give up files and threads; the store serves no longer."""


class ResidentExpertStore(ExpertStore):
    """All experts in the memory of the device that computes."""

    def __init__(self, layers: Sequence[ExpertWeights]) -> None:
        self._layers = tuple(layers)

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        return self._layers[index]
