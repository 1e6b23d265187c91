"""Calibration, layer by layer: the tokens of some text go through the original model and, beside it, through what is quantized so far.

What enters a matrix in either decides how it is rounded, so that each layer is fitted to the errors of those before it. Weights pass
through memory one matrix at a time, and one expert's three.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.attention import attention
from dbrx_q.kernels.moe import Routing, route
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import split_and_rotate
from dbrx_q.layers import rotation_of
from dbrx_q.layout import DenseTensor, kind_of

from .moments import Moments, moments_of
from .workers import Workers

__all__ = ["Calibration"]

_NORM_EPS = 1e-5
_PIECE_TOKENS = 4096  # whose activations are held beside the streams
_TASK_TOKENS = 512  # that one thread multiplies at a time


@dataclass
class _Streams:
    """float32 [T, .] each: what belongs to the quantized and to the original model."""

    quantized: torch.Tensor
    original: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> _Streams:
        return _Streams(function(self.quantized), function(self.original))


class Calibration:
    """Gives moments matrix by matrix, in the order of the model, and hears how each was quantized.

    Args:
        config: the model's.
        ids: int64 [B, S], the sequences.
        workers: that share the work.
        min_tokens: an expert that fewer tokens reach falls back to all tokens, weighted by the router's probability.

    Attributes:
        expert_tokens: of every layer, how many tokens reached each expert in the quantized model.
        fallbacks: (layer, expert) that fell back.
    """

    def __init__(self, config: DbrxConfig, ids: torch.Tensor, workers: Workers, *, min_tokens: int = 128) -> None:
        self._config, self._ids, self._workers, self._min_tokens = config, ids, workers, min_tokens
        self._rotation = rotation_of(torch.arange(ids.shape[1], dtype=torch.int32), config)
        self.expert_tokens: dict[int, list[int]] = {}
        self.fallbacks: list[tuple[int, int]] = []
        self._stream = self._entering = _Streams(torch.empty(0), torch.empty(0))
        self._added = self._entering
        self._moments: tuple[tuple[str, int], Moments] | None = None
        self._expert: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._routing: tuple[Routing, Routing] | None = None

    def keep(self, tensor: DenseTensor, values: torch.Tensor) -> None:
        """Go on past a tensor that stays as it is."""
        name = tensor.name
        if kind_of(name) == "norms":
            weight = values.float()
            self._entering = self._stream.map(lambda x: add_norm(x, None, weight, _NORM_EPS)[1])
        elif kind_of(name) == "router":
            self._route(tensor.layer, values.float())
        elif kind_of(name) == "embedding":
            self.embed(0, values, values)
        else:
            self.packed(tensor, -1, values.float(), values.float())

    def embed(self, first: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Begin with rows first .. of the embedding [n, D]: what they were and what became of them; all rows come, in their order."""
        ids = self._ids.flatten()
        if first == 0:
            self._stream = _Streams(torch.zeros(len(ids), self._config.d_model), torch.zeros(len(ids), self._config.d_model))
        here = ((ids >= first) & (ids < first + len(original))).nonzero(as_tuple=True)[0]
        self._stream.quantized[here] = quantized[ids[here] - first].float()
        self._stream.original[here] = original[ids[here] - first].float()

    def moments(self, tensor: DenseTensor, expert: int) -> Moments | None:
        """Of the inputs of a matrix; None for the embedding, and for an expert that too few tokens could ever reach."""
        if kind_of(tensor.name) == "embedding":
            return None
        shares = "down" if tensor.name.endswith(".w2") else "up"
        key = (f"{tensor.layer} {shares}" if expert >= 0 else tensor.name, expert)
        if self._moments is None or self._moments[0] != key:
            self._moments = None
            found = self._moments_of(tensor, expert)
            if found is None:
                return None
            self._moments = key, found
        return self._moments[1]

    def packed(self, tensor: DenseTensor, expert: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Go on past a matrix [N, K] of a block (of one expert): what it was and what became of it, decoded, both float32."""
        name = tensor.name
        if name.endswith(".Wqkv.weight"):
            self._entering = _Streams(self._attend(self._entering.quantized, quantized), self._attend(self._entering.original, original))
        elif name.endswith(".out_proj.weight"):
            self._stream.quantized += self._multiply(self._entering.quantized, quantized)
            self._stream.original += self._multiply(self._entering.original, original)
        elif expert >= 0:
            self._expert[name.rsplit(".", 1)[1]] = original, quantized
            if name.endswith(".w2"):
                self._add_expert(expert)
                if expert == tensor.experts - 1:
                    self._stream.quantized += self._added.quantized
                    self._stream.original += self._added.original

    def _attend(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, D]: the heads' outputs for normed inputs [T, D]."""
        clip, heads, channels = self._config.attn_config.clip_qkv, self._config.n_heads, self._config.head_dim

        def attend(tokens: torch.Tensor) -> torch.Tensor:
            qkv = tokens @ weight.T
            qkv = qkv if clip is None else qkv.clamp(-clip, clip)
            q, k, v = split_and_rotate(qkv, *self._rotation, heads=heads, channels=channels)
            return attention(q, k.transpose(0, 1), v.transpose(0, 1)).flatten(1)

        return torch.cat(self._workers.map(attend, x.split(self._ids.shape[1])))

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight.T."""
        return torch.cat(self._workers.map(lambda tokens: tokens @ weight.T, x.split(_TASK_TOKENS)))

    def _route(self, layer: int, router: torch.Tensor) -> None:
        ffn = self._config.ffn_config
        ours, theirs = (
            route(x, router, ffn.moe_top_k, ffn.moe_normalize_expert_weights) for x in (self._entering.quantized, self._entering.original)
        )
        self._routing = ours, theirs
        self._added = self._stream.map(torch.zeros_like)
        self.expert_tokens[layer] = ours.experts.flatten().bincount(minlength=ffn.moe_num_experts).tolist()

    def _moments_of(self, tensor: DenseTensor, expert: int) -> Moments | None:
        K = tensor.matrix[1]
        if expert < 0:
            pieces = zip(self._entering.quantized.split(_PIECE_TOKENS), self._entering.original.split(_PIECE_TOKENS), strict=True)
            return moments_of(((x, y, None) for x, y in pieces), K, self._workers)
        tokens, gates = self._tokens_of(tensor.layer, expert, down=tensor.name.endswith(".w2"))
        if len(tokens) < self._min_tokens:
            return None

        def inputs() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            for some, gate in zip(tokens.split(_PIECE_TOKENS), gates.split(_PIECE_TOKENS), strict=True):
                x, y = self._entering.quantized[some], self._entering.original[some]
                if tensor.name.endswith(".w2"):
                    x, y = self._hidden(x, quantized=True), self._hidden(y, quantized=False)
                yield x, y, gate

        return moments_of(inputs(), K, self._workers)

    def _tokens_of(self, layer: int, expert: int, *, down: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [t], float32 [t]): the tokens that calibrate an expert, and what its output for each weighs."""
        assert self._routing is not None
        ours = self._routing[0]
        tokens, rank = (ours.experts == expert).nonzero(as_tuple=True)
        if len(tokens) >= self._min_tokens:
            return tokens, ours.weights[tokens, rank]
        if not down:
            self.fallbacks.append((layer, expert))
        return torch.arange(len(ours.logits)), ours.logits.softmax(-1)[:, expert]

    def _hidden(self, x: torch.Tensor, *, quantized: bool) -> torch.Tensor:
        """[t, F]: what enters w2."""
        w1, v1 = (self._expert[name][quantized] for name in ("w1", "v1"))
        return torch.cat(self._workers.map(lambda tokens: F.silu(tokens @ w1.T) * (tokens @ v1.T), x.split(_TASK_TOKENS)))

    def _add_expert(self, expert: int) -> None:
        assert self._routing is not None
        sides = zip(self._routing, (True, False), (self._entering.quantized, self._entering.original), strict=True)
        for (routing, quantized, entering), added in zip(sides, (self._added.quantized, self._added.original), strict=True):
            tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
            w2 = self._expert["w2"][quantized]
            for some, gate in zip(tokens.split(_PIECE_TOKENS), routing.weights[tokens, rank].split(_PIECE_TOKENS), strict=True):
                added.index_add_(0, some, self._multiply(self._hidden(entering[some], quantized=quantized), w2) * gate[:, None])
