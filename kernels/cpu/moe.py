"""`moe_experts` on the CPU: experts with integer products in one go, the others one by one, in any order.

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
from .choice import Product, Regime, activation_bytes, matmul
from .integer import Job, multiply
from .linear import choice_for, linear, quantized, quantized_gated, use_threads

__all__ = ["ExpertOutputs", "moe_experts"]

_PAIRS = 512  # whose gate and up are in memory at a time, as float32


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
        self._quantized: dict[tuple[str, int, int], QuantizedActivations] = {}

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
        integer: dict[int, int] = {}
        for e, slot in slots.items():
            first, end = self._places[e]
            if _integer_serves(layer, end - first, self._x):
                integer[e] = slot
                continue
            chosen = self._x[self._tokens[first:end]]
            h = F.silu(_dense_or_tiled(chosen, layer.w1, slot)) * _dense_or_tiled(chosen, layer.v1, slot)  # [tokens of e, F]
            self._rows[self._by_expert[first:end]] = _dense_or_tiled(h, layer.w2, slot).float()
        if integer:
            self._add_integer(layer, integer)

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """float32 y [T, D] with `weights` float32 [T, A]: for each token the weighted sum of its experts' rows."""
        T, A = self._shape
        rows, weights = self._rows.view(T, A, self._x.shape[1]), weights.float()
        y = rows[:, 0] * weights[:, :1]
        for a in range(1, A):
            y.addcmul_(rows[:, a], weights[:, a : a + 1])
        return y

    def _add_integer(self, layer: ExpertWeights, slots: Mapping[int, int]) -> None:
        """Compute the rows of experts by integer products: those of all experts at once, as far as `_PAIRS` allows."""
        w1, v1, w2 = (weight.contiguous_matrices() for weight in (layer.w1, layer.v1, layer.w2) if isinstance(weight, QuantizedWeight))
        # Experts whose activations get integers of one size are computed together, so that a row's bits do not depend on other experts.
        pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (slot, first and end among the pairs)
        for e, slot in slots.items():
            begin, stop = self._places[e]
            choice = choice_for(stop - begin, self._x, w1)
            sizes = activation_bytes(Product.GATE_AND_UP, choice), activation_bytes(Product.DOWN, choice)
            pieces.setdefault(sizes, []).extend((slot, first, min(stop, first + _PAIRS)) for first in range(begin, stop, _PAIRS))
        for sizes, alike in pieces.items():
            while alike:
                ends = np.cumsum([end - first for _, first, end in alike])
                count = max(1, int(np.searchsorted(ends, _PAIRS, side="right")))
                self._add_pieces((w1, v1, w2), sizes, alike[:count])
                alike = alike[count:]

    def _add_pieces(self, weights: tuple[QuantizedWeight, ...], sizes: tuple[int, int], pieces: list[tuple[int, int, int]]) -> None:
        (w1, v1, w2), slots = weights, [slot for slot, _, _ in pieces]
        offsets = np.cumsum([0] + [end - first for _, first, end in pieces]).tolist()
        pairs = torch.cat([torch.arange(first, end) for _, first, end in pieces])
        tokens, rows, places = self._tokens[pairs].numpy(), self._by_expert[pairs].numpy(), np.arange(len(pairs))
        gate, up = torch.empty(2, len(pairs), w1.shape[-2]).unbind()
        jobs = [Job(w1, slots, gate), Job(v1, slots, up)]
        for together in [jobs] if (w1.format, w1.group_size) == (v1.format, v1.group_size) else [jobs[:1], jobs[1:]]:
            x = self._activations(together[0].weight, sizes[0])
            use_threads(len(slots) * len(together) * w1.shape[-2] * w1.shape[-1])
            multiply(x, together, offsets, tokens, places)
        h = quantized_gated(gate, up, w2, sizes[1])
        use_threads(len(slots) * w2.shape[-2] * w2.shape[-1])
        multiply(h, [Job(w2, slots, self._rows)], offsets, places, rows)

    def _activations(self, weight: QuantizedWeight, code_bytes: int) -> QuantizedActivations:
        """The tokens, quantized for integer products with such a weight."""
        key = (weight.format, weight.group_size, code_bytes)
        if key not in self._quantized:
            self._quantized[key] = quantized(self._x, weight, Product.GATE_AND_UP, code_bytes)
        return self._quantized[key]


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


def _integer_serves(layer: ExpertWeights, count: int, x: torch.Tensor) -> bool:
    weights = layer.w1, layer.v1, layer.w2
    return all(isinstance(w, QuantizedWeight) and choice_for(count, x, w).regime is Regime.INTEGER for w in weights)


def _dense_or_tiled(x: torch.Tensor, weight: Weight, slot: int) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return matmul(x, weight[slot])
    return linear(x, weight[slot])
