"""What the stores over tiers share: predictions of the next layer's experts, and a fallback copy in place of experts on disk."""

from __future__ import annotations

import threading
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
    """A layer's router, which predicts the layer's experts from the input of the layer before."""

    weight: torch.Tensor
    """[E, D]."""
    top_k: int
    """Active experts of a token."""


@dataclass(frozen=True)
class FallbackCopy:
    """A copy of all experts at fewer bits, used in place of experts that are only on disk."""

    tier: HostTier
    """Host memory that holds the whole copy once it is filled."""
    upgrade: bool = True
    """Whether experts that the copy replaced are read at full precision for the next time, while the disk has nothing else to do. Which
    of the two is used then depends on the speed of the disk. Without, the experts in memory never change, so runs are reproducible."""


class TieredExpertStore(ExpertStore):
    """A store that moves experts between memories.

    Several threads may run a model of it. They take turns layer by layer: slots hold the experts of one call of `forward` at a time.

    Args:
        tier: host memory over disk; closed with the store.
        prefetch: whether experts are fetched before they are needed.
        routers: of every layer, which predict its experts; None if the caller gives `run` the predictions.
        fallback: used in place of experts that are only on disk; None to wait for them. With it, nothing is prefetched from disk: a layer
            is too short for that.
    """

    def __init__(
        self, tier: HostTier, *, prefetch: bool, routers: Sequence[NextRouter] | None = None, fallback: FallbackCopy | None = None
    ) -> None:
        self.tier, self.fallback = tier, fallback
        self._predictor = ExpertPredictor(tier.n_layers, tier.n_experts) if prefetch else None
        self._routers = routers
        # Held while a layer is served, counters are read, and the store is closed.
        self._lock = threading.RLock()

    @property
    def memory_bytes(self) -> int:
        return self.tier.nbytes + (0 if self.fallback is None else self.fallback.tier.nbytes)

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        expert_sum = sum_for(x, routing)
        predicted = None
        if self._predictor is not None and self._routers is not None and self._prefetches_after(index) and len(x):
            router = self._routers[index + 1]
            predicted = route(x, router.weight, router.top_k, None).experts.cpu().numpy()
        with self._lock:
            self.run(index, expert_sum, predicted)
            return expert_sum.result()

    def run(self, index: int, expert_sum: ExpertSum, predicted: np.ndarray | None) -> None:
        """Add the experts that layer `index` needs to `expert_sum`; one thread at a time may call it.

        Args:
            index: the layer.
            expert_sum: says which experts are needed, and computes them.
            predicted: [T, A], what the next layer's router chooses from this layer's input, best first; None for no prediction.
        """
        needed, ahead = list(expert_sum.counts), []
        if self._predictor is not None:
            self._predictor.observe(index, needed)
            if predicted is not None and self._prefetches_after(index):
                ahead = self._predictor.predict(index + 1, predicted)
        self._serve(index, expert_sum, needed, ahead)

    def fill(self, priority: np.ndarray | None = None) -> None:
        """Read the likeliest experts into all slots, and return when they have arrived.

        Args:
            priority: [L, E], how likely each expert is; None for equally many of each layer.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        self.tier.fill(priority)
        self._fill_fallback()

    def close(self) -> None:
        with self._lock:  # the layer that a thread is in ends first
            self.tier.close()
            if self.fallback is not None:
                self.fallback.tier.close()

    def _fill_fallback(self) -> None:
        if self.fallback is not None:
            self.fallback.tier.fill()
            self.fallback.tier.close()  # all of it has been read

    def _prefetches_after(self, index: int) -> bool:
        """Whether a layer follows `index` whose experts can be prefetched while `index` is served."""
        return index + 1 < self.tier.n_layers

    @abstractmethod
    def _serve(self, index: int, expert_sum: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        """Add the needed experts of a layer to the sum; meanwhile prefetch those of `ahead`, which the next layer may need."""

    def _prediction_counts(self) -> tuple[int, int]:
        """(requests that had been predicted, requests of layers with predictions)."""
        return (0, 0) if self._predictor is None else (self._predictor.predicted, self._predictor.needed)
