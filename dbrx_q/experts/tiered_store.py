"""What the stores over tiers share: predicting what the next layer needs, and a fallback copy that answers for what lies on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.kernels.router import route

from .host_tier import HostTier
from .predictor import ExpertPredictor
from .store import ExpertStore
from .sums import ExpertSum, sum_for

__all__ = ["FallbackCopy", "NextRouter", "TieredExpertStore"]


@dataclass(frozen=True)
class NextRouter:
    """What predicts the experts of a layer from the input of the layer before: its router. weight: [E, D]."""

    weight: torch.Tensor
    top_k: int


@dataclass(frozen=True)
class FallbackCopy:
    """A copy of all experts at fewer bits, which answers for those that lie on disk.

    tier: host memory that holds all of it once it is filled. upgrade: whether experts that it answered for are brought at their full bits
    for the next time, while the disk has nothing else to do. Which of the two answers then depends on how fast the disk is; without, what
    memory holds at full bits never changes, and a run repeats.
    """

    tier: HostTier
    upgrade: bool = True


class TieredExpertStore(ExpertStore):
    """A store that brings experts from tier to tier.

    Args:
        tier: host memory over disk; closed with the store.
        prefetch: whether experts are brought before they are needed.
        routers: of every layer, which predict them; None where `run` is given the guesses.
        fallback: answers for what lies on disk, from which nothing is then prefetched: a layer is too short for that. None to wait for it.
    """

    def __init__(
        self, tier: HostTier, *, prefetch: bool, routers: Sequence[NextRouter] | None = None, fallback: FallbackCopy | None = None
    ) -> None:
        self.tier, self.fallback = tier, fallback
        self._predictor = ExpertPredictor(tier.n_layers, tier.n_experts) if prefetch else None
        self._routers = routers

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        total = sum_for(x, routing)
        guesses = None
        if self._predictor is not None and self._routers is not None and self._follows(index) and len(x):
            router = self._routers[index + 1]
            guesses = route(x, router.weight, router.top_k, None).experts.cpu().numpy()
        self.run(index, total, guesses)
        return total.result()

    def run(self, index: int, total: ExpertSum, guesses: np.ndarray | None) -> None:
        """Add what layer `index` needs to `total`.

        Args:
            index: the layer.
            total: tells what is needed.
            guesses: [T, A], best first, what the next layer's router chooses from this layer's input; None to predict nothing.
        """
        needed, ahead = list(total.counts), []
        if self._predictor is not None:
            self._predictor.judge(index, needed)
            if guesses is not None and self._follows(index):
                ahead = self._predictor.guess(index + 1, guesses)
        self._serve(index, total, needed, ahead)

    def fill(self, priority: np.ndarray | None = None) -> None:
        """Bring the likeliest experts, by `priority` [L, E], or as many of each layer, into the slots, and return when they are there.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        self.tier.fill(priority)
        self._fill_fallback()

    def close(self) -> None:
        self.tier.close()
        if self.fallback is not None:
            self.fallback.tier.close()

    def _fill_fallback(self) -> None:
        if self.fallback is not None:
            self.fallback.tier.fill()
            self.fallback.tier.close()  # nothing is left to be read

    def _follows(self, index: int) -> bool:
        """Whether what is brought for the next layer goes to the same place."""
        return index + 1 < self.tier.n_layers

    @abstractmethod
    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        """Add the experts of a layer to the sum, and bring some of the next layer's meanwhile."""

    def _guessed(self) -> tuple[int, int]:
        """(requests that had been predicted, requests that could have been)."""
        return (0, 0) if self._predictor is None else (self._predictor.predicted, self._predictor.needed)
