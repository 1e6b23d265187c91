"""The interface of expert stores, and the store of a model whose experts are all in the memory of the device that computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from dbrx_q.checkpoint.deferred_checks import DeferredChecks
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.moe import moe_experts

from .stats import ExpertStats

__all__ = ["ExpertStore", "ResidentExpertStore"]


class ExpertStore(ABC):
    """Computes the experts of a layer, whichever memory holds them.

    Dimension letters: `T` tokens, `A` active experts of a token, `D` d_model.
    """

    reloads_each_step = False
    """Whether a layer's weights are read or dequantized again in every forward pass, so that a pass should take many tokens."""

    @abstractmethod
    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        """Weights of layer `index` that include every expert of `experts`, int64 [T, A]; valid until the next call,
        which another thread may make in a store that moves experts."""

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The weighted sum of the experts of layer `index` for the tokens `x` [T, D]: [T, D] in their dtype."""
        return moe_experts(x, routing.experts, routing.weights, self.layer(index, routing.experts))

    def stats(self) -> ExpertStats:
        """Counters since the model was loaded; zeros for a store that holds all experts."""
        return ExpertStats()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory that the store has for experts; 0 where the modules of the model hold them."""
        return 0

    def check_weights(self) -> None:  # noqa: B027 # most stores check weights when they read them
        """Check now all weights whose check for NaN and infinity waits for their first use.

        Raises:
            CheckpointError: a weight is not finite.
        """

    def close(self) -> None:  # noqa: B027 # most stores have nothing to close
        """Close files and end threads; the store cannot be used afterwards."""


class ResidentExpertStore(ExpertStore):
    """All experts in the memory of the device that computes.

    Args:
        layers: the experts of every layer.
        checks: of weights that are checked for NaN and infinity before their first use; None where all are known to be finite.
    """

    def __init__(self, layers: Sequence[ExpertWeights], checks: DeferredChecks | None = None) -> None:
        self._layers = tuple(layers)
        self._checks = checks

    @property
    def layers(self) -> tuple[ExpertWeights, ...]:
        """The experts of every layer."""
        return self._layers

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        if self._checks is not None:
            self._checks.before_use(index, experts)
            if self._checks.done:
                self._checks = None
        return self._layers[index]

    def check_weights(self) -> None:
        if self._checks is not None:
            self._checks.check_all()
            self._checks = None
