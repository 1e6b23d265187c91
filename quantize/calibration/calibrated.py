"""Calibration, layer by layer: the tokens of some text go through what is quantized so far and, beside it, through the original model.

What enters a matrix in either decides how it is rounded, so that each layer is fitted to the errors of those before it. Weights pass
through memory one matrix at a time, and one expert's three; activations lie in memory or in files.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dbrx_q.checkpoint.layout import DenseTensor, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.attention import attention
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import split_and_rotate
from dbrx_q.kernels.router import route
from dbrx_q.model.layers import rotation_of
from dbrx_q.quantize.methods.moments import Moments, moments_of
from dbrx_q.quantize.methods.products import Products

from .activations import ActivationStore

__all__ = ["ORIGINAL", "PIECE_TOKENS", "QUANTIZED", "Calibration", "CalibrationOptions", "Fit"]

QUANTIZED, ORIGINAL = "quantized", "original"
"""The two models."""

_NORM_EPS = 1e-5
PIECE_TOKENS = 4096
"""Whose activations are held beside the streams."""
_SNAPSHOT = "layer-{}.{}.bin"


@dataclass(frozen=True)
class CalibrationOptions:
    """What decides how tokens calibrate.

    activations: the model whose activations enter a layer, `QUANTIZED` or `ORIGINAL`. all_experts: every token goes through every expert
    and weighs alike, instead of those that the router sends there. min_tokens: an expert that fewer reach falls back to all tokens of
    its layer, weighted by the router's probability, and to none at all where those are fewer. act_order: as in `Moments`.
    """

    activations: str = QUANTIZED
    all_experts: bool = False
    min_tokens: int = 128
    act_order: bool = True


@dataclass(frozen=True)
class Fit:
    """What a matrix is fitted to. moments: None where it is rounded without. tokens: how many. by: as in `TensorRecord.calibrated_by`."""

    moments: Moments | None
    tokens: int
    by: str


@dataclass
class _Side:
    """One of the models: what runs through its layers, and what enters the next matrix; an expert's weights, the router's decision."""

    stream: ActivationStore
    entering: ActivationStore
    expert: dict[str, torch.Tensor]
    routing: Routing | None = None


class Calibration:
    """Gives moments matrix by matrix, in the order of the model, and hears how each was quantized.

    Args:
        config: the model's.
        ids: int64 [B, S], the sequences.
        products: that multiply.
        sides: `QUANTIZED`, `ORIGINAL` or both: the models that run. Moments of a method that compares them need both.
        options: how tokens calibrate.
        folder: where a snapshot is kept of what enters the layer that is worked on; None keeps none.
        in_files: whether activations lie in files in that folder and not in memory.
        squares: whether the diagonal of Hessians is enough.
        kept_tokens: of an expert that no more tokens than these reach, what enters w2 is kept from its moments until it is passed on.

    Attributes:
        expert_tokens: of every layer, how many tokens reached each expert in the model whose activations calibrate.
    """

    def __init__(
        self,
        config: DbrxConfig,
        ids: torch.Tensor,
        products: Products,
        *,
        sides: tuple[str, ...] = (QUANTIZED, ORIGINAL),
        options: CalibrationOptions = CalibrationOptions(),
        folder: Path | None = None,
        in_files: bool = False,
        squares: bool = False,
        kept_tokens: int = 0,
    ) -> None:
        assert options.activations in sides
        self._config, self._ids, self._products, self._options, self._folder = config, ids, products, options, folder
        self._squares, self._kept_tokens = squares, kept_tokens
        self._hidden_pieces: list[torch.Tensor] = []
        self._rotation = rotation_of(torch.arange(ids.shape[1], dtype=torch.int32), config)
        self.expert_tokens: dict[int, list[int]] = {}
        if folder is not None:
            folder.mkdir(exist_ok=True)

        def activations(side: str, what: str) -> ActivationStore:
            path = folder / f"{what}.{side}.bin" if in_files and folder is not None else None
            return ActivationStore(ids.numel(), config.d_model, path)

        self._sides = {side: _Side(activations(side, "stream"), activations(side, "entering"), {}) for side in sides}
        self._fit: tuple[tuple[str, int, torch.device | None], Fit] | None = None

    def close(self) -> None:
        """Let go of all activations."""
        for side in self._sides.values():
            side.stream.close()
            side.entering.close()

    @property
    def models(self) -> int:
        """That run."""
        return len(self._sides)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """While this lasts, the CPU multiplies: a GPU had too little memory."""
        self._hidden_pieces.clear()
        before, self._products, self._fit = self._products, self._products.on_cpu(), None
        try:
            yield
        finally:
            self._products = before

    def begin_layer(self, layer: int) -> float | None:
        """Before the first matrix of a layer (of the head: n_layers) a snapshot is taken, which replaces the last one.

        Gives the relative error of what enters it, |quantized - original| / |original|; None where only one of the models runs.
        """
        if layer < 0:
            return None
        if self._folder is not None and layer > 0:
            for name, side in self._sides.items():
                path = self._folder / _SNAPSHOT.format(layer, name)
                if not path.exists():  # as it does when a run goes on from it
                    side.stream.save(path)
            for name in self._sides:
                (self._folder / _SNAPSHOT.format(layer - 1, name)).unlink(missing_ok=True)
        if len(self._sides) < 2:
            return None
        error = square = 0.0
        for first, original in self._sides[ORIGINAL].stream.pieces(PIECE_TOKENS):
            quantized = self._sides[QUANTIZED].stream.read(first, len(original))
            error += float((quantized - original).square().sum(dtype=torch.float64))
            square += float(original.square().sum(dtype=torch.float64))
        return (error / square) ** 0.5 if square else 0.0

    def restore(self, before: int) -> int:
        """Go back to the latest snapshot of a layer up to `before`; that layer, 0 for the beginning."""
        for layer in range(before, 0, -1):
            paths = {name: (self._folder or Path()) / _SNAPSHOT.format(layer, name) for name in self._sides}
            if self._folder is not None and all(path.exists() for path in paths.values()):
                for name, side in self._sides.items():
                    side.stream.load(paths[name])
                return layer
        return 0

    def keep(self, tensor: DenseTensor, values: torch.Tensor) -> None:
        """Go on past a tensor that stays as it is."""
        name = tensor.name
        if kind_of(name) == "norms":
            for side in self._sides.values():
                self._normalise(side, values.float())
        elif kind_of(name) == "router":
            self._route(tensor.layer, values.float())
        elif kind_of(name) == "embedding":
            self.embed(0, values, values)
        else:
            self.packed(tensor, -1, values, values.float())

    def embed(self, first: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Begin with rows first .. of the embedding [n, D]: what they were and what became of them; all rows come, in their order."""
        ids = self._ids.flatten()
        here = ((ids >= first) & (ids < first + len(original))).nonzero(as_tuple=True)[0]
        for name, side in self._sides.items():
            rows = quantized if name == QUANTIZED else original
            for some in here.split(PIECE_TOKENS):
                side.stream.add(some, rows[ids[some] - first].float())

    def fit(self, tensor: DenseTensor, expert: int) -> Fit:
        """What the inputs of a matrix tell."""
        if kind_of(tensor.name) == "embedding":
            return Fit(None, 0, "")
        shares = "down" if tensor.name.endswith(".w2") else "up"
        key = (f"{tensor.layer} {shares}" if expert >= 0 else tensor.name, expert, self._products.device)
        if self._fit is None or self._fit[0] != key:
            self._fit = None  # before the next ones are made
            self._fit = key, self._fit_of(tensor, expert)
        return self._fit[1]

    def hidden_importance(self, expert: int, v1: torch.Tensor) -> torch.Tensor | None:
        """float32 [F], the mean square of what enters an expert's w2, each token weighted as in its Hessian; w1 has come, `v1` is due.

        None where too few tokens reach the expert.
        """
        side = self._sides[self._options.activations]
        tokens, gates, by = self._tokens_of(side, expert)
        if by == "none":
            return None
        found = torch.zeros(len(v1), device=self._products.place)
        side.expert["v1"] = self._products.prepared(v1)
        for some, gate in zip(tokens.split(PIECE_TOKENS), gates.split(PIECE_TOKENS), strict=True):
            hidden = self._inputs(side, some, down=True)
            found += hidden.mul_(gate[:, None].to(hidden.device)).square_().sum(0).to(found.device)
        del side.expert["v1"]
        return found.cpu() / len(tokens)

    def packed(self, tensor: DenseTensor, expert: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Go on past a matrix [N, K] of a block (of one expert): what it was, and what became of it, decoded to float32."""
        name = tensor.name
        for which, side in self._sides.items():
            weight = self._products.prepared(quantized if which == QUANTIZED else original)
            if name.endswith(".Wqkv.weight"):
                self._attend(side, weight)
            elif name.endswith(".out_proj.weight"):
                side.stream.fill(
                    PIECE_TOKENS,
                    lambda first, n, side=side, weight=weight: (  # type: ignore[misc] # mypy cannot infer a lambda with defaults
                        side.stream.read(first, n) + self._products.linear(side.entering.read(first, n), weight).cpu()
                    ),
                )
            elif expert >= 0:
                side.expert[name.rsplit(".", 1)[1]] = weight
                if name.endswith(".w2"):
                    self._add_expert(side, expert)
                    side.expert.clear()

    def _normalise(self, side: _Side, weight: torch.Tensor) -> None:
        side.entering.fill(PIECE_TOKENS, lambda first, n: add_norm(side.stream.read(first, n), None, weight, _NORM_EPS)[1])

    def _attend(self, side: _Side, weight: torch.Tensor) -> None:
        """What enters becomes the heads' outputs for it, some whole sequences at a time."""
        clip, heads, channels, S = self._config.attn_config.clip_qkv, self._config.n_heads, self._config.head_dim, self._ids.shape[1]

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            cos, sin = (angles.to(qkv.device) for angles in self._rotation)
            q, k, v = split_and_rotate(qkv, cos, sin, heads=heads, channels=channels)
            return attention(q, k.transpose(0, 1), v.transpose(0, 1)).flatten(1)

        def outputs(first: int, n: int) -> torch.Tensor:
            qkv = self._products.linear(side.entering.read(first, n), weight)
            qkv = qkv if clip is None else qkv.clamp_(-clip, clip)
            if qkv.device.type != "cpu":
                return torch.cat([attend(some).cpu() for some in qkv.split(S)])
            return torch.cat(self._products.workers.map(attend, qkv.split(S)))

        side.entering.fill(max(1, PIECE_TOKENS // S) * S, outputs)

    def _route(self, layer: int, router: torch.Tensor) -> None:
        ffn = self._config.ffn_config
        for side in self._sides.values():
            parts = [route(x, router, ffn.moe_top_k, ffn.moe_normalize_expert_weights) for _, x in side.entering.pieces(PIECE_TOKENS)]
            side.routing = Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "experts", "weights")))
        chosen = self._routing(self._sides[self._options.activations]).experts
        self.expert_tokens[layer] = chosen.flatten().bincount(minlength=ffn.moe_num_experts).tolist()

    @staticmethod
    def _routing(side: _Side) -> Routing:
        assert side.routing is not None, "the router comes before the experts"
        return side.routing

    def _fit_of(self, tensor: DenseTensor, expert: int) -> Fit:
        K, T = tensor.matrix[1], self._ids.numel()
        main = self._sides[self._options.activations]
        other = self._sides[ORIGINAL] if len(self._sides) == 2 else None
        if expert < 0:
            pieces = (
                (x, None if other is None else other.entering.read(first, len(x)), None) for first, x in main.entering.pieces(PIECE_TOKENS)
            )
            return Fit(moments_of(pieces, K, self._products, act_order=self._options.act_order, squares=self._squares), T, "tokens")
        tokens, gates, by = self._tokens_of(main, expert)
        if by == "none":
            return Fit(None, 0, by)
        down = tensor.name.endswith(".w2")
        kept = down and by == "tokens" and not self._options.all_experts and len(tokens) <= self._kept_tokens

        def inputs() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
            for some, gate in zip(tokens.split(PIECE_TOKENS), gates.split(PIECE_TOKENS), strict=True):
                x, y = (None if side is None else self._inputs(side, some, down) for side in (main, other))
                assert x is not None
                if kept:
                    self._hidden_pieces.append(x.to(self._products.dtype))
                yield x, y, gate

        return Fit(moments_of(inputs(), K, self._products, act_order=self._options.act_order, squares=self._squares), len(tokens), by)

    def _inputs(self, side: _Side, tokens: torch.Tensor, down: bool) -> torch.Tensor:
        """What enters an expert's w1 and v1, or its w2."""
        x = side.entering.gather(tokens)
        return self._hidden(side, x) if down else x

    def _tokens_of(self, side: _Side, expert: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """(int64 [t], float32 [t], why these): the tokens that calibrate an expert, and what its output for each weighs."""
        routing = self._routing(side)
        T = len(routing.logits)
        if self._options.all_experts:
            return torch.arange(T), torch.ones(T), "tokens"
        tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
        if len(tokens) >= self._options.min_tokens:
            return tokens, routing.weights[tokens, rank], "tokens"
        by = "layer" if self._options.min_tokens <= T else "none"
        return torch.arange(T), routing.logits.softmax(-1)[:, expert], by

    def _hidden(self, side: _Side, x: torch.Tensor) -> torch.Tensor:
        """[t, F]: what enters w2."""
        gate = F.silu(self._products.linear(x, side.expert["w1"]), inplace=True)
        return gate.mul_(self._products.linear(x, side.expert["v1"]).to(gate.device))

    def _add_expert(self, side: _Side, expert: int) -> None:
        """The expert's share goes into the stream at once: what enters the others is apart from it."""
        routing = self._routing(side)
        tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
        kept = self._hidden_pieces if side is self._sides[self._options.activations] else []
        for some, gate in zip(tokens.split(PIECE_TOKENS), routing.weights[tokens, rank].split(PIECE_TOKENS), strict=True):
            hidden = kept.pop(0) if kept else self._hidden(side, side.entering.gather(some))
            side.stream.add(some, self._products.linear(hidden, side.expert["w2"]).cpu().mul_(gate[:, None]))
