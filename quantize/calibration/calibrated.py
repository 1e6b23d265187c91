"""Calibration layer by layer: the tokens of a text run through the part of the model that is quantized so far and, beside it, through the
original model.

The inputs of a matrix in either model decide how it is quantized, so that each layer is fitted to the errors of the layers before it.
Weights are in memory one matrix at a time, or the three matrices of one expert; activations are in memory or in files.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.layout import DenseTensor, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.model.block import expert_hidden, normed, rotation_of, routed
from dbrx_q.quantize.methods.moments import Moments, moments_of
from dbrx_q.quantize.methods.products import Products

from .activations import ActivationStore
from .attention import attention_heads
from .sources import CalibrationSequences

__all__ = ["ACTIVATIONS", "ORIGINAL", "PIECE_TOKENS", "QUANTIZED", "Calibration", "CalibrationOptions", "Fit"]

QUANTIZED, ORIGINAL = ACTIVATIONS = ("quantized", "original")
"""The two models."""

PIECE_TOKENS = 4096
"""Tokens whose activations are in memory at a time, beside the stored ones."""

_SNAPSHOT = "layer-{}.{}.bin"


@dataclass(frozen=True)
class CalibrationOptions:
    """How tokens calibrate a matrix."""

    activations: str = QUANTIZED
    """The model whose activations a matrix is fitted to: `QUANTIZED` or `ORIGINAL`."""
    all_experts: bool = False
    """Whether every token calibrates every expert with the same weight, not only the experts that the router chooses for it."""
    min_tokens: int = 128
    """An expert that fewer tokens reach is calibrated with all tokens of its layer, weighted by the router's probability; without data
    where the layer has fewer tokens than that."""
    act_order: bool = True
    """As in `Moments`."""


@dataclass(frozen=True)
class Fit:
    """The data that a matrix is fitted to."""

    moments: Moments | None
    """None where the matrix is quantized without data."""
    tokens: int
    """Number of tokens in the moments."""
    by: str
    """As in `TensorRecord.calibrated_by`."""


@dataclass
class _ModelState:
    """The activations of one of the two models at the matrix that is quantized next."""

    stream: ActivationStore
    """float32 [T, D]: the residual stream."""
    inputs: ActivationStore
    """float32 [T, D]: the input of the next matrix; within the experts of a layer, of their w1 and v1."""
    expert: dict[str, torch.Tensor]
    """The matrices [N, K] of the current expert so far, by role."""
    routing: Routing | None = None
    """The router's decision in the current layer."""


class Calibration:
    """Gives the moments of each matrix, in the order of the model, and takes the quantized matrix to compute the inputs of the next one.

    Args:
        config: of the model.
        sequences: what the tokens are drawn from; those that are held out are not run.
        products: multiplies.
        models: `QUANTIZED`, `ORIGINAL` or both: the models that run. A method that compares them needs both.
        options: how tokens calibrate a matrix.
        folder: keeps a snapshot of the residual streams at the current layer; None for no snapshots.
        in_files: whether activations are stored in files in that folder, not in memory.
        squares: whether the diagonal of each Hessian is enough.
        kept_tokens: for an expert that at most so many tokens reach, the inputs of w2 are kept after its moments are computed, so that
            they are not computed again for its output.

    Attributes:
        expert_tokens: for each layer, the number of tokens that reach each expert, in the model that `options.activations` names.
        expert_tokens_by_source: for each layer, a list for each source: how many of its tokens reach each expert.
    """

    def __init__(
        self,
        config: DbrxConfig,
        sequences: CalibrationSequences,
        products: Products,
        *,
        models: tuple[str, ...] = (QUANTIZED, ORIGINAL),
        options: CalibrationOptions = CalibrationOptions(),
        folder: Path | None = None,
        in_files: bool = False,
        squares: bool = False,
        kept_tokens: int = 0,
    ) -> None:
        assert options.activations in models
        ids = sequences.ids
        self._config, self._ids, self._products, self._options, self._folder = config, ids, products, options, folder
        self._sequences = sequences
        self._squares, self._kept_tokens = squares, kept_tokens
        self._hidden_pieces: list[torch.Tensor] = []
        self._rotation = rotation_of(torch.arange(ids.shape[1], dtype=torch.int32), config)
        self.expert_tokens: dict[int, list[int]] = {}
        self.expert_tokens_by_source: dict[int, list[list[int]]] = {}
        if folder is not None:
            folder.mkdir(exist_ok=True)

        def store(side: str, what: str) -> ActivationStore:
            path = folder / f"{what}.{side}.bin" if in_files and folder is not None else None
            return ActivationStore(ids.numel(), config.d_model, path)

        self._states = {side: _ModelState(store(side, "stream"), store(side, "inputs"), {}) for side in models}
        self._fit: tuple[tuple[str, int, torch.device | None], Fit] | None = None

    def close(self) -> None:
        """Free all activations."""
        for state in self._states.values():
            state.stream.close()
            state.inputs.close()

    @property
    def model_count(self) -> int:
        """How many models run."""
        return len(self._states)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Multiply on the CPU within this context, for a matrix that does not fit on the GPU."""
        self._hidden_pieces.clear()
        before, self._products, self._fit = self._products, self._products.on_cpu(), None
        try:
            yield
        finally:
            self._products = before

    def begin_layer(self, layer: int) -> float | None:
        """Before the first matrix of a layer (n_layers for the head), replace the last snapshot.

        Returns the relative error of the residual stream, |quantized - original| / |original|; None where only one of the models runs.

        Raises:
            CheckpointError: activations that are not finite.
        """
        if layer < 0:
            return None
        self._check_finite(layer)
        if self._folder is not None and layer > 0:
            for name, state in self._states.items():
                path = self._folder / _SNAPSHOT.format(layer, name)
                if not path.exists():  # it exists in a run that was resumed from it
                    state.stream.save(path)
            for name in self._states:
                (self._folder / _SNAPSHOT.format(layer - 1, name)).unlink(missing_ok=True)
        if len(self._states) < 2:
            return None
        error = square = 0.0
        for first, original in self._states[ORIGINAL].stream.pieces(PIECE_TOKENS):
            quantized = self._states[QUANTIZED].stream.read(first, len(original))
            error += float((quantized - original).square().sum(dtype=torch.float64))
            square += float(original.square().sum(dtype=torch.float64))
        return (error / square) ** 0.5 if square else 0.0

    def _check_finite(self, layer: int) -> None:
        """Refuse to fit a layer to activations that are not finite, of which only NaN could come."""
        for name, state in self._states.items():
            if not all(math.isfinite(float(piece.sum(dtype=torch.float64))) for _, piece in state.stream.pieces(PIECE_TOKENS)):
                raise CheckpointError(
                    f"the activations of the {name} model must be finite; found NaN or infinity before layer {layer}. Its weights are "
                    "damaged or too large: check the checkpoint, or choose a method without calibration"
                )

    def restore(self, before: int) -> int:
        """Load the latest snapshot of a layer up to `before`; returns that layer, 0 where no snapshot exists."""
        for layer in range(before, 0, -1):
            paths = {name: (self._folder or Path()) / _SNAPSHOT.format(layer, name) for name in self._states}
            if self._folder is not None and all(path.exists() for path in paths.values()):
                for name, state in self._states.items():
                    state.stream.load(paths[name])
                return layer
        return 0

    def fit(self, tensor: DenseTensor, expert: int) -> Fit:
        """The moments of the inputs of a matrix; `expert` is -1 where the tensor is not a stack."""
        if tensor.role == "embedding":
            return Fit(None, 0, "")
        inputs = "down" if tensor.role == "w2" else "up"  # w1 and v1 share theirs
        key = (f"{tensor.layer} {inputs}" if expert >= 0 else tensor.name, expert, self._products.device)
        if self._fit is None or self._fit[0] != key:
            self._fit = None  # frees the last moments first
            self._fit = key, self._fit_of(tensor, expert)
        return self._fit[1]

    def hidden_importance(self, expert: int, v1: torch.Tensor) -> torch.Tensor | None:
        """float32 [F]: the mean square of the inputs of an expert's w2, each token weighted as in its Hessian.

        Called between w1 and `v1` [F, D]. None where too few tokens reach the expert.
        """
        state = self._states[self._options.activations]
        tokens, gates, by = self._tokens_of(state, expert)
        if by == "none":
            return None
        sums = torch.zeros(len(v1), device=self._products.place)
        state.expert["v1"] = self._products.prepared(v1)
        for piece, gate in zip(tokens.split(PIECE_TOKENS), gates.split(PIECE_TOKENS), strict=True):
            hidden = self._inputs_of(state, piece, down=True)
            sums += hidden.mul_(gate[:, None].to(hidden.device)).square_().sum(0).to(sums.device)
        del state.expert["v1"]
        return sums.cpu() / len(tokens)

    def embed(self, first: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Look up the tokens of rows first .. of the embedding, original and quantized [n, D]; all rows are given in their order."""
        ids = self._ids.flatten()
        matching = ((ids >= first) & (ids < first + len(original))).nonzero(as_tuple=True)[0]
        for name, state in self._states.items():
            rows = quantized if name == QUANTIZED else original
            for tokens in matching.split(PIECE_TOKENS):
                state.stream.add(tokens, rows[ids[tokens] - first].float())

    def advance_plain(self, tensor: DenseTensor, values: torch.Tensor) -> None:
        """Run the tokens through a tensor that is not quantized: a norm, a router, or a matrix that stays plain."""
        kind = kind_of(tensor.name)
        if kind == "norms":
            for state in self._states.values():
                self._normalize(state, values.float())
        elif kind == "router":
            self._route(tensor.layer, values.float())
        elif kind == "embedding":
            self.embed(0, values, values)
        else:
            self.advance(tensor, -1, values, values.float())

    def advance(self, tensor: DenseTensor, expert: int, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Run the tokens through a matrix [N, K] of a block, or of one of its experts.

        Args:
            tensor: the matrix or the stack that it is from.
            expert: -1 where the tensor is not a stack.
            original: the matrix of the original model.
            quantized: float32, the dequantized matrix.
        """
        for side, state in self._states.items():
            weight = self._products.prepared(quantized if side == QUANTIZED else original)
            if tensor.role == "Wqkv":
                self._attend(state, weight)
            elif tensor.role == "out_proj":
                self._add_attention(state, weight)
            elif expert >= 0:
                state.expert[tensor.role] = weight
                if tensor.role == "w2":
                    self._add_expert(state, expert)
                    state.expert.clear()

    def _normalize(self, state: _ModelState, weight: torch.Tensor) -> None:
        def outputs(first: int, n: int) -> torch.Tensor:
            return normed(state.stream.read(first, n), weight)[1]

        state.inputs.fill(PIECE_TOKENS, outputs)

    def _attend(self, state: _ModelState, weight: torch.Tensor) -> None:
        """Replace the inputs of Wqkv by those of out_proj, some whole sequences at a time."""
        S = self._ids.shape[1]

        def outputs(first: int, n: int) -> torch.Tensor:
            qkv = self._products.linear(state.inputs.read(first, n), weight)
            return attention_heads(qkv, self._rotation, self._config, self._products)

        state.inputs.fill(max(1, PIECE_TOKENS // S) * S, outputs)

    def _add_attention(self, state: _ModelState, weight: torch.Tensor) -> None:
        def outputs(first: int, n: int) -> torch.Tensor:
            return state.stream.read(first, n) + self._products.linear(state.inputs.read(first, n), weight).cpu()

        state.stream.fill(PIECE_TOKENS, outputs)

    def _route(self, layer: int, router: torch.Tensor) -> None:
        ffn = self._config.ffn_config
        for state in self._states.values():
            parts = [routed(x, router, ffn) for _, x in state.inputs.pieces(PIECE_TOKENS)]
            state.routing = Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "experts", "weights")))
        chosen = self._routing(self._states[self._options.activations]).experts
        S = self._ids.shape[1]
        counts = [
            chosen[S * span.start : S * span.stop].flatten().bincount(minlength=ffn.moe_num_experts) for span in self._sequences.spans
        ]
        self.expert_tokens[layer] = torch.stack(counts).sum(0).tolist()
        self.expert_tokens_by_source[layer] = [count.tolist() for count in counts]

    def _add_expert(self, state: _ModelState, expert: int) -> None:
        """Add the output of an expert to the residual stream; the inputs of the other experts are stored apart from the stream."""
        routing = self._routing(state)
        tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
        kept = self._hidden_pieces if state is self._states[self._options.activations] else []
        for piece, gate in zip(tokens.split(PIECE_TOKENS), routing.weights[tokens, rank].split(PIECE_TOKENS), strict=True):
            hidden = kept.pop(0) if kept else self._inputs_of(state, piece, down=True)
            state.stream.add(piece, self._products.linear(hidden, state.expert["w2"]).cpu().mul_(gate[:, None]))

    def _fit_of(self, tensor: DenseTensor, expert: int) -> Fit:
        main = self._states[self._options.activations]
        other = self._states[ORIGINAL] if len(self._states) == 2 else None
        if expert < 0:
            pieces = (
                (x, None if other is None else other.inputs.read(first, len(x)), None) for first, x in main.inputs.pieces(PIECE_TOKENS)
            )
            return Fit(self._moments(tensor, pieces), self._ids.numel(), "tokens")
        tokens, gates, by = self._tokens_of(main, expert)
        if by == "none":
            return Fit(None, 0, by)
        down = tensor.role == "w2"
        kept = down and by == "tokens" and not self._options.all_experts and len(tokens) <= self._kept_tokens

        def inputs() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
            for piece, gate in zip(tokens.split(PIECE_TOKENS), gates.split(PIECE_TOKENS), strict=True):
                x = self._inputs_of(main, piece, down)
                y = None if other is None else self._inputs_of(other, piece, down)
                if kept:
                    self._hidden_pieces.append(x.to(self._products.dtype))
                yield x, y, gate

        return Fit(self._moments(tensor, inputs()), len(tokens), by)

    def _moments(self, tensor: DenseTensor, pieces: Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]) -> Moments:
        return moments_of(pieces, tensor.matrix[1], self._products, act_order=self._options.act_order, squares=self._squares)

    def _inputs_of(self, state: _ModelState, tokens: torch.Tensor, down: bool) -> torch.Tensor:
        """The inputs of an expert's w2 [t, F] where `down`, otherwise of its w1 and v1 [t, D]."""
        x = state.inputs.gather(tokens)
        return expert_hidden(x, state.expert["w1"], state.expert["v1"], self._products.linear) if down else x

    def _tokens_of(self, state: _ModelState, expert: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """The tokens that calibrate an expert, int64 [t], the weight of its output for each, float32 [t], and `Fit.by`."""
        routing = self._routing(state)
        T = len(routing.logits)
        if self._options.all_experts:
            return torch.arange(T), torch.ones(T), "tokens"
        tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
        if len(tokens) >= self._options.min_tokens:
            return tokens, routing.weights[tokens, rank], "tokens"
        by = "layer" if self._options.min_tokens <= T else "none"
        return torch.arange(T), routing.logits.softmax(-1)[:, expert], by

    @staticmethod
    def _routing(state: _ModelState) -> Routing:
        assert state.routing is not None, "the router precedes the experts"
        return state.routing
