"""`moe_experts` on the CPU: the experts of a layer one by one, in any order.

Dimension letters: `T` tokens, `A` active experts of a token, `P` pairs of a token and one of its experts (T * A), `E` experts, `D` d_model,
`F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight

from .activations import QuantizedActivations
from .choice import Regime, matmul
from .linear import activation_group, choice_for, linear, matvec, quantized

__all__ = ["ExpertOutputs", "moe_experts"]


class ExpertOutputs:
    """Collects the outputs of experts, a row for each pair of a token and one of its experts, and sums them.

    Each row is computed independently of the others, and the rows of a token are summed by the rank of its experts. The sum therefore has
    the same bits in whatever order and in whatever groups the experts are added.

    Args:
        x: [T, D].
        experts: int64 [T, A], the experts of each token, best first.
    """

    def __init__(self, x: torch.Tensor, experts: torch.Tensor) -> None:
        self._x, self._shape = x, experts.shape
        self._by_expert = experts.flatten().argsort(stable=True)  # [P], pairs in the order of their experts
        self._tokens = self._by_expert // max(1, experts.shape[1])  # [P]
        counts = experts.flatten().bincount().tolist()
        ends = np.cumsum([0, *counts]).tolist()
        self._places = {e: (ends[e], ends[e + 1]) for e, count in enumerate(counts) if count}
        self._rows = torch.zeros(self._by_expert.numel(), x.shape[1])  # [P, D], zeros for experts that are not added
        self._quantized: dict[int, QuantizedActivations] = {}

    @property
    def counts(self) -> dict[int, int]:
        """How many tokens chose an expert, for each that any token chose, in ascending order."""
        return {e: end - first for e, (first, end) in self._places.items()}

    def add(self, layer: ExpertWeights, slots: Mapping[int, int]) -> None:
        """Compute the rows of some of the experts in `counts`.

        Args:
            layer: holds their weights.
            slots: the slot of the matrices of each expert.
        """
        few: dict[int, int] = {}
        for e, slot in slots.items():
            first, end = self._places[e]
            if _matvec_serves(layer, end - first, self._x):
                few[e] = slot
                continue
            chosen = self._x[self._tokens[first:end]]
            h = F.silu(_dense_or_tiled(chosen, layer.w1, slot)) * _dense_or_tiled(chosen, layer.v1, slot)  # [tokens of e, F]
            self._rows[self._by_expert[first:end]] = _dense_or_tiled(h, layer.w2, slot).float()
        if few:
            self._add_few(layer, few)

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """float32 y [T, D] with `weights` float32 [T, A]: for each token the weighted sum of its experts' rows."""
        T, A = self._shape
        rows, weights = self._rows.view(T, A, self._x.shape[1]), weights.float()
        y = rows[:, 0] * weights[:, :1]
        for a in range(1, A):
            y.addcmul_(rows[:, a], weights[:, a : a + 1])
        return y

    def _add_few(self, layer: ExpertWeights, slots: Mapping[int, int]) -> None:
        """Compute the rows of experts with few tokens, all these experts in each product."""
        assert isinstance(layer.w1, QuantizedWeight)
        assert isinstance(layer.v1, QuantizedWeight)
        assert isinstance(layer.w2, QuantizedWeight)
        places = [self._places[e] for e in slots]
        pairs = torch.cat([torch.arange(first, end) for first, end in places])
        chosen = np.array(list(slots.values()))
        offsets = np.cumsum([0] + [end - first for first, end in places])
        tokens = self._tokens[pairs]
        gate_x = _take(self._activations(layer.w1), tokens)
        up_x = gate_x if activation_group(layer.w1) == activation_group(layer.v1) else _take(self._activations(layer.v1), tokens)
        h = F.silu(matvec(gate_x, layer.w1, chosen, offsets)) * matvec(up_x, layer.v1, chosen, offsets)  # [pairs, F]
        self._rows[self._by_expert[pairs]] = matvec(quantized(h, layer.w2), layer.w2, chosen, offsets)

    def _activations(self, weight: QuantizedWeight) -> QuantizedActivations:
        """The tokens, quantized for dot products with such a weight."""
        group = activation_group(weight)
        if group not in self._quantized:
            self._quantized[group] = quantized(self._x, weight)
        return self._quantized[group]


def moe_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 y [T, D]; see `dbrx_q.kernels.moe.moe_experts`."""
    outputs = ExpertOutputs(x, experts)
    slots = range(layer.n_experts) if layer.slots is None else layer.slots.tolist()
    outputs.add(layer, {e: slots[e] for e in outputs.counts if slots[e] >= 0})
    if missing is not None:
        for e, count in outputs.counts.items():
            missing[e] += count if slots[e] < 0 else 0
    return outputs.total(weights)


def _matvec_serves(layer: ExpertWeights, count: int, x: torch.Tensor) -> bool:
    weights = layer.w1, layer.v1, layer.w2
    return all(isinstance(w, QuantizedWeight) and choice_for(count, x, w).regime is Regime.MATVEC for w in weights)


def _take(x: QuantizedActivations, rows: torch.Tensor) -> QuantizedActivations:
    return QuantizedActivations(x.codes[rows], x.scales[rows], x.sums[rows])


def _dense_or_tiled(x: torch.Tensor, weight: Weight, slot: int) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return matmul(x, weight[slot])
    return linear(x, weight[slot])
