"""Where the experts live: a model asks an expert store for the experts of a layer and does not know more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .kernels.moe import ExpertWeights

__all__ = ["ExpertStore", "ResidentExpertStore"]


class ExpertStore(ABC):
    """Serves expert weights layer by layer.

    Attributes:
        renewed: whether a layer's weights are read or decoded again whenever it is reached, so that many tokens should go through at once.
    """

    renewed = False

    @abstractmethod
    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        """Weights of layer `index` in which every expert of `experts`, int64 [T, A], is present; valid until the next call."""


class ResidentExpertStore(ExpertStore):
    """All experts in the memory of the device that computes."""

    def __init__(self, layers: Sequence[ExpertWeights]) -> None:
        self._layers = tuple(layers)

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        return self._layers[index]
