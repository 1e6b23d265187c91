"""A guard for calibration: held-out tokens run through the original model, the quantized one and one that is rounded to nearest.

Nothing is fitted to these tokens. Where the quantized model errs more on them than rounding to nearest does, calibration has hurt.

Dimension letters: `H` sequences, `S` tokens of one, `T` = H S tokens, `D` d_model, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from dbrx_q.checkpoint.layout import DenseTensor, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.quantize.methods.products import Products

from .divergence import Divergence
from .forward import ORIGINAL, PIECE_TOKENS, QUANTIZED, LayerwiseForward, ModelState
from .sources import CalibrationSequences

__all__ = [
    "CHECKED",
    "HELD_OUT",
    "LEFT_OUT",
    "NEAREST",
    "CheckSequences",
    "HeldOutForward",
    "HeldOutSequences",
    "MeanDivergence",
    "SourceDivergence",
    "is_worse",
    "models_of",
]

NEAREST = "rtn"
"""The model in which every packed tensor is rounded to nearest in its format."""

HELD_OUT, LEFT_OUT, CHECKED = "held out", "left out", "check text"
"""What a source is: one that calibrates, of which a part is held out; one of weight 0, which is only measured; a check text."""

_LEAST_TOKENS = 64
"""A source whose tokens reach a matrix less often is judged together with the other such sources."""
_STANDARD_ERRORS = 2.0
"""A difference is no noise if it is larger than so many of its standard errors."""


@dataclass(frozen=True)
class CheckSequences:
    """A text on which the result is measured and by which nothing is chosen."""

    name: str
    """As given."""
    ids: torch.Tensor
    """int64 [n, S]: its sequences."""


@dataclass(frozen=True)
class HeldOutSequences:
    """All sequences that nothing is fitted to."""

    ids: torch.Tensor
    """int64 [H, S]: the sequences of one source stand together."""
    counts: tuple[int, ...]
    """For each source, its sequences; at least 1."""
    names: tuple[str, ...]
    """Of the sources."""
    kinds: tuple[str, ...]
    """Of the sources: `HELD_OUT`, `LEFT_OUT` or `CHECKED`."""

    @classmethod
    def of(cls, sequences: CalibrationSequences | None, checks: Sequence[CheckSequences]) -> HeldOutSequences | None:
        """What the sources of a calibration have held out, then the check texts; None if there is nothing."""
        sources: list[tuple[str, str, torch.Tensor]] = []
        if sequences is not None:
            for name, weight, span in zip(sequences.names, sequences.weights, sequences.held_out_spans, strict=True):
                sources.append((name, HELD_OUT if weight > 0 else LEFT_OUT, sequences.held_out[span]))
        sources += [(check.name, CHECKED, check.ids) for check in checks]
        sources = [source for source in sources if len(source[2])]
        if not sources:
            return None
        names, kinds, ids = zip(*sources, strict=True)
        return cls(torch.cat(ids), tuple(map(len, ids)), names, kinds)

    @property
    def spans(self) -> tuple[slice, ...]:
        """For each source, where its sequences are in `ids`."""
        return tuple(slice(end - count, end) for end, count in zip(accumulate(self.counts), self.counts, strict=True))

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.numel()

    @property
    def checked_tokens(self) -> int:
        """Those of check texts."""
        return self.ids.shape[1] * sum(count for count, kind in zip(self.counts, self.kinds, strict=True) if kind == CHECKED)


@dataclass(frozen=True)
class MeanDivergence:
    """A mean over sequences, in nats."""

    mean: float
    """The mean."""
    stderr: float
    """Its standard error; 0 for one sequence."""


@dataclass(frozen=True)
class SourceDivergence:
    """KL divergence from the original model on one source, the mean over its predicted tokens."""

    quantized: MeanDivergence
    """Of the quantized model."""
    nearest: MeanDivergence
    """Of the model that is rounded to nearest."""
    difference: MeanDivergence
    """Of the quantized model's minus the other's, sequence by sequence."""

    @classmethod
    def read(cls, figures: Sequence[float]) -> SourceDivergence:
        """The inverse of `figures`."""
        return cls(*(MeanDivergence(*figures[n : n + 2]) for n in (0, 2, 4)))

    @property
    def figures(self) -> list[float]:
        """Mean and standard error of each field, as the journal holds them."""
        return [figure for mean in (self.quantized, self.nearest, self.difference) for figure in (mean.mean, mean.stderr)]

    @property
    def hurts(self) -> bool:
        """Whether the quantized model is further from the original than rounding to nearest, by more than two standard errors; also where
        a figure is not a number, as of logits that overflow. One sequence, which has no standard error, does not show it.
        """
        difference = self.difference
        return math.isnan(difference.mean) or difference.mean > _STANDARD_ERRORS * difference.stderr > 0


def models_of(*, nearest: bool) -> tuple[str, ...]:
    """The models that held-out sequences run through; `nearest` as for `HeldOutForward`."""
    return (ORIGINAL, QUANTIZED, NEAREST) if nearest else (ORIGINAL, QUANTIZED)


class HeldOutForward(LayerwiseForward):
    """Runs held-out sequences through `ORIGINAL`, `QUANTIZED` and `NEAREST`.

    Args:
        config: of the models.
        sequences: to run.
        products: multiplies.
        nearest: whether the model `NEAREST` runs; without it the quantized model is that model.
        folder: keeps a snapshot of the residual streams at the current layer; None for no snapshots.
        in_files: whether activations are stored in files in that folder, not in memory.
    """

    def __init__(
        self,
        config: DbrxConfig,
        sequences: HeldOutSequences,
        products: Products,
        *,
        nearest: bool = True,
        folder: Path | None = None,
        in_files: bool = False,
    ) -> None:
        models = models_of(nearest=nearest)
        super().__init__(config, sequences.ids, products, models=models, folder=folder, in_files=in_files, prefix="held-out-")
        self._sequences = sequences
        self._compared = models[1:]
        S = sequences.ids.shape[1]
        deciding = [span for span, kind in zip(sequences.spans, sequences.kinds, strict=True) if kind != CHECKED]
        self._source_of = torch.full((sequences.tokens,), -1)
        """int64 [T]: the source of each token that may decide; -1 for those of check texts."""
        for number, span in enumerate(deciding):
            self._source_of[S * span.start : S * span.stop] = number

    def stream_errors(self) -> list[list[float]]:
        """For each source the relative error of the residual stream, |x - original| / |original|, of the quantized model and `NEAREST`."""
        S = self._ids.shape[1]
        return [self._stream_errors(S * span.start, S * span.stop) for span in self._sequences.spans]

    def _stream_errors(self, start: int, stop: int) -> list[float]:
        errors, square = dict.fromkeys(self._compared, 0.0), 0.0
        for first in range(start, stop, PIECE_TOKENS):
            count = min(PIECE_TOKENS, stop - first)
            original = self._states[ORIGINAL].stream.read(first, count)
            square += float(original.square().sum(dtype=torch.float64))
            for name in self._compared:
                errors[name] += float((self._states[name].stream.read(first, count) - original).square().sum(dtype=torch.float64))
        both = [math.sqrt(errors[name] / square) if square else 0.0 for name in self._compared]
        return [both[0], both[-1]]

    def advance_plain(self, tensor: DenseTensor, values: torch.Tensor) -> None:
        """As for every forward; a head that stays plain is measured by `divergence`."""
        if kind_of(tensor.name) != "head":
            super().advance_plain(tensor, values)

    def prefers_nearest(self, tensor: DenseTensor, expert: int, original: torch.Tensor, candidates: Sequence[torch.Tensor]) -> bool:
        """Whether a matrix that is rounded to nearest errs less on a source than the quantized one: see `is_worse`.

        Both are given the inputs of the quantized model and must give what the original matrix gives on the original model's inputs,
        so that a matrix which compensates errors of the layers before it is credited for that. A token that the quantized model routes
        to an expert weighs by the square of the router's weight, as its error weighs in the layer's output.

        Args:
            tensor: the matrix of a block, or the stack that it is from.
            expert: -1 where the tensor is not a stack.
            original: [N, K].
            candidates: the quantized matrix and the one that is rounded to nearest, float32 [N, K].
        """
        quantized, reference = self._states[QUANTIZED], self._states[ORIGINAL]
        down = tensor.role == "w2"
        original, *weights = (self._products.prepared(weight) for weight in (original, *candidates))
        tokens, gates = self._deciding_tokens(quantized, expert)
        errors = torch.zeros(2, len(tokens), dtype=torch.float64)
        for start in range(0, len(tokens), PIECE_TOKENS):
            piece = tokens[start : start + PIECE_TOKENS]
            target = self._products.linear(self._inputs_of(reference, piece, down), original)
            x = self._inputs_of(quantized, piece, down)
            for error, weight in zip(errors, weights, strict=True):
                change = self._products.linear(x, weight)
                change -= target.to(change.device)  # a weight for which the GPU has no room is multiplied on the CPU
                error[start : start + len(piece)] = change.square_().sum(1, dtype=torch.float64).cpu()
        errors *= gates.double().square()
        return is_worse(errors[0], errors[1], self._source_of[tokens])

    @property
    def deciding_ids(self) -> torch.Tensor:
        """int64 [n]: the ids of the tokens that may decide, ascending and none twice."""
        return self._ids.flatten()[self._source_of >= 0].unique()

    def prefers_nearest_embedding(self, original: torch.Tensor, candidates: Sequence[torch.Tensor]) -> bool:
        """As `prefers_nearest` for the embedding, of which the rows of `deciding_ids` [n, D] are given: a token's error is its row's."""
        tokens = (self._source_of >= 0).nonzero(as_tuple=True)[0]
        place = torch.searchsorted(self.deciding_ids, self._ids.flatten()[tokens])
        quantized, nearest = ((rows - original).square().sum(1, dtype=torch.float64)[place] for rows in candidates)
        return is_worse(quantized, nearest, self._source_of[tokens])

    def divergence(self, names: Sequence[str], blocks: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """float64 [T]: the KL divergence of each model's prediction from the original's, by the name of the model.

        Args:
            names: of the models; one that does not run gets the inputs of the quantized model.
            blocks: the rows [n, D] of the head of every model, some at a time.
        """
        others = [name for name in names if name != ORIGINAL]
        result = Divergence(self._ids.numel(), ORIGINAL, others, self._products.workers)
        states = {name: self._states.get(name, self._states[QUANTIZED]) for name in (ORIGINAL, *others)}
        for block in blocks:
            for rows in Divergence.rows(len(block[ORIGINAL])):
                weights = {name: self._products.prepared(block[name][rows]) for name in states}
                for first in range(0, self._ids.numel(), PIECE_TOKENS):
                    logits = {
                        name: self._products.linear(state.inputs.read(first, PIECE_TOKENS), weights[name]).cpu()
                        for name, state in states.items()
                    }
                    result.add(first, logits)
        return {name: result.of(name) for name in others}

    def prefers_nearest_head(self, quantized: torch.Tensor, nearest: torch.Tensor) -> bool:
        """As `prefers_nearest`, for divergences float64 [T] of the quantized model with its own head and with one rounded to nearest."""
        S = self._ids.shape[1]
        predicted = torch.arange(len(quantized)) % S != S - 1
        tokens = ((self._source_of >= 0) & predicted).nonzero(as_tuple=True)[0]
        return is_worse(quantized[tokens], nearest[tokens], self._source_of[tokens])

    def by_source(self, divergence: Mapping[str, torch.Tensor]) -> list[SourceDivergence]:
        """The means for each source; the last token of a sequence, which predicts none of it, is left out."""
        S = self._ids.shape[1]
        quantized, nearest = (divergence[name].view(-1, S)[:, :-1].mean(1) for name in (self._compared[0], self._compared[-1]))
        return [
            SourceDivergence(_mean(quantized[span]), _mean(nearest[span]), _mean((quantized - nearest)[span]))
            for span in self._sequences.spans
        ]

    def _deciding_tokens(self, state: ModelState, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that reach a matrix and may decide, int64 [t], and the router's weight for each, float32 [t]."""
        if expert < 0:
            tokens = (self._source_of >= 0).nonzero(as_tuple=True)[0]
            return tokens, torch.ones(len(tokens))
        tokens, rank = (state.chosen.experts == expert).nonzero(as_tuple=True)
        deciding = self._source_of[tokens] >= 0
        return tokens[deciding], state.chosen.weights[tokens, rank][deciding]

    def _inputs_of(self, state: ModelState, tokens: torch.Tensor, down: bool) -> torch.Tensor:
        return self._hidden_of(state, tokens) if down else state.inputs.gather(tokens)


def is_worse(quantized: torch.Tensor, nearest: torch.Tensor, source_of: torch.Tensor) -> bool:
    """Whether errors are larger on a source than others, by more than two standard errors of the difference.

    Sources of fewer than 64 tokens are judged together, as one, if they have so many in all.

    Args:
        quantized, nearest: float64 [t], errors of every token.
        source_of: int64 [t], the source of each.
    """
    return any(_is_worse(quantized[tokens] - nearest[tokens]) for tokens in _judged_together(source_of))


def _judged_together(source_of: torch.Tensor) -> Iterator[torch.Tensor]:
    """int64 [n]: the tokens of every source that has enough, then those of all others."""
    few = []
    for source in source_of.unique().tolist():
        tokens = (source_of == source).nonzero(as_tuple=True)[0]
        if len(tokens) >= _LEAST_TOKENS:
            yield tokens
        else:
            few.append(tokens)
    pooled = torch.cat(few) if few else source_of[:0]
    if len(pooled) >= _LEAST_TOKENS:
        yield pooled


def _is_worse(differences: torch.Tensor) -> bool:
    mean = _mean(differences)
    return mean.mean > _STANDARD_ERRORS * mean.stderr


def _mean(values: torch.Tensor) -> MeanDivergence:
    """The mean of float64 [n], and its standard error from the standard deviation (n - 1)."""
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return MeanDivergence(float(values.mean()), stderr)
