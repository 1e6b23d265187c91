"""Calibration layer by layer: the tokens of a text run through the part of the model that is quantized so far and, beside it, through the
original model.

The inputs of a matrix in either model decide how it is quantized, so that each layer is fitted to the errors of the layers before it.
Weights are in memory one matrix at a time, or the three matrices of one expert; activations are in memory or in files.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.config import DbrxConfig
from dbrx_q.quantize.methods.folds import FoldPiece, shrunk_moments
from dbrx_q.quantize.methods.moments import Moments, moments_of
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.shrinkage import Shrinkage

from .forward import ORIGINAL, PIECE_TOKENS, QUANTIZED, LayerwiseForward, ModelState
from .sources import CalibrationSequences

__all__ = ["ACTIVATIONS", "Calibration", "CalibrationOptions", "Fit", "random_sequences"]

ACTIVATIONS = (QUANTIZED, ORIGINAL)
"""The models whose activations may calibrate."""

_TEXTS_PER_RANDOM = 16  # sequences of the sources for one of random tokens


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
    shrinkage: Shrinkage | None = None
    """The damping and the weights of sources that were chosen; None for a method that does not choose them."""


class Calibration(LayerwiseForward):
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
        shrinks: whether damping and the weights of sources are chosen for each matrix (`methods.shrinkage`). Sequences of random tokens
            run beside those of the sources then (`random_sequences`).
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
        shrinks: bool = False,
        kept_tokens: int = 0,
    ) -> None:
        assert options.activations in models
        ids = torch.cat([sequences.ids, random_sequences(config, *sequences.ids.shape)]) if shrinks else sequences.ids
        super().__init__(config, ids, products, models=models, folder=folder, in_files=in_files)
        self._sequences, self._options, self._squares, self._kept_tokens = sequences, options, squares, kept_tokens
        self._shrinks = shrinks
        self._folds = _folds_of(sequences, len(ids))
        self._text_tokens = sequences.ids.numel()
        self._hidden_pieces: list[torch.Tensor] = []
        self.expert_tokens: dict[int, list[int]] = {}
        self.expert_tokens_by_source: dict[int, list[list[int]]] = {}
        self._fit: tuple[tuple[str, int, torch.device | None], Fit] | None = None

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Multiply on the CPU within this context, for a matrix that does not fit on the GPU."""
        self._hidden_pieces.clear()
        before, self._products, self._fit = self._products, self._products.on_cpu(), None
        try:
            yield
        finally:
            self._products = before

    def stream_error(self) -> float | None:
        """The relative error of the residual stream, |quantized - original| / |original|; None where only one of the models runs."""
        if len(self._states) < 2:
            return None
        error = square = 0.0
        for first, original in self._states[ORIGINAL].stream.pieces(PIECE_TOKENS):
            quantized = self._states[QUANTIZED].stream.read(first, len(original))
            texts = max(0, self._text_tokens - first)
            error += float((quantized - original)[:texts].square().sum(dtype=torch.float64))
            square += float(original[:texts].square().sum(dtype=torch.float64))
        return (error / square) ** 0.5 if square else 0.0

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

    def _route(self, layer: int, router: torch.Tensor) -> None:
        super()._route(layer, router)
        chosen = self._states[self._options.activations].chosen.experts
        S, E = self._ids.shape[1], self._config.ffn_config.moe_num_experts
        counts = [chosen[S * span.start : S * span.stop].flatten().bincount(minlength=E) for span in self._sequences.spans]
        self.expert_tokens[layer] = torch.stack(counts).sum(0).tolist()
        self.expert_tokens_by_source[layer] = [count.tolist() for count in counts]

    def _hidden_of(self, state: ModelState, tokens: torch.Tensor) -> torch.Tensor:
        if self._hidden_pieces and state is self._states[self._options.activations]:
            return self._hidden_pieces.pop(0)
        return super()._hidden_of(state, tokens)

    def _fit_of(self, tensor: DenseTensor, expert: int) -> Fit:
        main = self._states[self._options.activations]
        other = self._states[ORIGINAL] if len(self._states) == 2 else None
        if expert < 0:

            def layer_inputs(step: int) -> Iterator[FoldPiece]:
                for first, x in main.inputs.pieces(PIECE_TOKENS):
                    y = None if other is None else other.inputs.read(first, len(x))[::step]
                    yield x[::step], y, None, self._folds[first : first + len(x)][::step]

            return self._summed(tensor, layer_inputs, self._text_tokens, "tokens")
        tokens, gates, by = self._tokens_of(main, expert)
        if by == "none":
            return Fit(None, 0, by)
        down = tensor.role == "w2"
        keeps = down and by == "tokens" and not self._options.all_experts and len(tokens) <= self._kept_tokens

        def inputs(step: int) -> Iterator[FoldPiece]:
            self._hidden_pieces.clear()  # of a pass before, which compared columns of every token
            for piece, gate in zip(tokens[::step].split(PIECE_TOKENS), gates[::step].split(PIECE_TOKENS), strict=True):
                x = self._inputs_of(main, piece, down)
                y = None if other is None else self._inputs_of(other, piece, down)
                if keeps and step == 1:
                    self._hidden_pieces.append(x.to(self._products.dtype))
                yield x, y, gate, self._folds[piece]

        return self._summed(tensor, inputs, int((tokens < self._text_tokens).sum()), by)

    def _summed(self, tensor: DenseTensor, inputs: Callable[[int], Iterator[FoldPiece]], tokens: int, by: str) -> Fit:
        """The fit to the tokens whose inputs `inputs(1)` gives; `inputs(n)` gives those of every n-th token."""
        K, act_order = tensor.matrix[1], self._options.act_order
        if self._shrinks:
            moments, shrinkage = shrunk_moments(inputs, K, len(self._sequences.counts), self._products, act_order=act_order)
            return Fit(moments, tokens, by, shrinkage)
        pieces = (piece[:3] for piece in inputs(1))
        return Fit(moments_of(pieces, K, self._products, act_order=act_order, squares=self._squares), tokens, by)

    def _inputs_of(self, state: ModelState, tokens: torch.Tensor, down: bool) -> torch.Tensor:
        """The inputs of an expert's w2 [t, F] where `down`, otherwise of its w1 and v1 [t, D]."""
        return super()._hidden_of(state, tokens) if down else state.inputs.gather(tokens)

    def _tokens_of(self, state: ModelState, expert: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """The tokens that calibrate an expert, int64 [t], the weight of its output for each, float32 [t], and `Fit.by`."""
        routing = state.chosen
        T = len(routing.logits)
        if self._options.all_experts:
            return torch.arange(T), torch.ones(T), "tokens"
        tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
        if int((tokens < self._text_tokens).sum()) >= self._options.min_tokens:
            return tokens, routing.weights[tokens, rank], "tokens"
        by = "layer" if self._options.min_tokens <= self._text_tokens else "none"
        return torch.arange(T), routing.logits.softmax(-1)[:, expert], by


def random_sequences(config: DbrxConfig, count: int, length: int) -> torch.Tensor:
    """int64 [count / 16, length]: tokens drawn evenly from the vocabulary, at least one sequence; the same in every run.

    Args:
        config: of the model.
        count: sequences of texts.
        length: tokens of each.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (-(-count // _TEXTS_PER_RANDOM), length), generator=generator)


def _folds_of(sequences: CalibrationSequences, count: int) -> torch.Tensor:
    """int64 [T]: the fold of each token of `count` sequences, as in `FoldPiece`.

    The second half of a source's sequences come later in its text.
    """
    parts = [2 * source + (torch.arange(n) >= n // 2).long() for source, n in enumerate(sequences.counts)]
    folds = torch.full((count,), 2 * len(parts))
    folds[: len(sequences.ids)] = torch.cat(parts)
    return folds.repeat_interleave(sequences.ids.shape[1])
