"""The weighted sum of a layer's experts, wherever each of them is computed.

Dimension letters: `T` tokens, `D` d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch

from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.moe import moe_experts

if TYPE_CHECKING:
    from dbrx_q.kernels.cpu.moe import ExpertOutputs

__all__ = ["ExpertSum", "PairSum", "PartialSum", "sum_for"]

_FEW_TOKENS = 64  # whose activations are copied to the host whether or not the CPU will compute an expert


def sum_for(x: torch.Tensor, routing: Routing) -> ExpertSum:
    """An empty sum for the tokens `x` [T, D], which are on the device that computes."""
    return PairSum(x, routing) if x.device.type == "cpu" else PartialSum(x, routing)


class ExpertSum(ABC):
    """Computes experts in any order and adds up their outputs."""

    counts: dict[int, int]
    """How many tokens chose each expert, in ascending order of experts; only those that are chosen."""

    @abstractmethod
    def add_gpu(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        """Add experts whose matrices are in these slots of the device that computes.

        Args:
            weights: of all slots.
            slots: the slot of each expert to add.
        """

    @abstractmethod
    def add_host(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        """Add experts whose matrices are in these slots of host memory; arguments as for `add_gpu`."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """[T, D] in the tokens' dtype, once all experts were added."""


class PairSum(ExpertSum):
    """For tokens in host memory: every (token, expert) pair is computed by itself, so the order of experts does not change the bits."""

    def __init__(self, x: torch.Tensor, routing: Routing) -> None:
        self._outputs, self._weights, self._dtype = _expert_outputs()(x, routing.experts), routing.weights, x.dtype
        self.counts = self._outputs.counts

    def add_gpu(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        self._outputs.add(weights, slots)

    def add_host(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        self._outputs.add(weights, slots)

    def result(self) -> torch.Tensor:
        return self._outputs.total(self._weights).to(self._dtype)


class PartialSum(ExpertSum):
    """For tokens on a GPU: one launch for all hits, one for each copied expert; the CPU's outputs are added at the end, in float32."""

    def __init__(self, x: torch.Tensor, routing: Routing) -> None:
        self._x, self._routing = x, routing
        self._chosen, self._weights = routing.experts.cpu(), routing.weights.cpu()  # the only wait for the GPU in a layer
        counts = self._chosen.flatten().bincount().tolist()
        self.counts = {e: count for e, count in enumerate(counts) if count}
        self._total: torch.Tensor | None = None  # float32 [T, D]
        # Copied before anything is launched, because later the copy would wait for the launched work.
        self._on_host = x.cpu() if len(x) <= _FEW_TOKENS else None
        self._host: ExpertOutputs | None = None

    def add_gpu(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        n_experts = self._routing.logits.shape[1]
        on_gpu = self._x.device.type == "cuda"
        slot_by_expert = torch.tensor([slots.get(e, -1) for e in range(n_experts)], dtype=torch.int32, pin_memory=on_gpu)
        layer = ExpertWeights(weights.w1, weights.v1, weights.w2, slot_by_expert.to(self._x.device, non_blocking=True))
        part = moe_experts(self._x, self._routing.experts, self._routing.weights, layer)
        self._total = part.float() if self._total is None else self._total.add_(part)

    def add_host(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        if self._host is None:
            self._host = _expert_outputs()(self._x.cpu() if self._on_host is None else self._on_host, self._chosen)
        self._host.add(weights, slots)

    def result(self) -> torch.Tensor:
        total = torch.zeros(self._x.shape, dtype=torch.float32, device=self._x.device) if self._total is None else self._total
        if self._host is not None:
            total += self._host.total(self._weights).to(total.device)
        return total.to(self._x.dtype)


@cache
def _expert_outputs() -> type[ExpertOutputs]:
    from dbrx_q.kernels.cpu.moe import ExpertOutputs  # imports numba, which a GPU that computes all experts does not need

    return ExpertOutputs
