"""KL divergence between the predictions of several models, from logits that come for some rows of the vocabulary at a time.

Dimension letters: `T` tokens, `n` rows of the head, a part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dbrx_q.quantize.methods.workers import Workers

__all__ = ["DIVERGENCE_BYTES", "Divergence"]

_PIECE_TOKENS = 64  # whose logits are float64 at a time, on each thread
_MOST_ROWS = 4096  # of the head, whose logits `Divergence.add` takes at a time
DIVERGENCE_BYTES = 6 * 8 * _PIECE_TOKENS * _MOST_ROWS
"""The most bytes of temporary tensors on each thread."""


class Divergence:
    """KL(reference || model) of every token and model; no more than some rows of logits are in memory.

    With p the reference's probabilities and z, w the logits of reference and model, KL = sum of p (z - w) + log sum exp w - log sum exp z.
    The sums are kept relative to the largest logit so far (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

    Args:
        tokens: T.
        reference: the name of the model that the others are compared with.
        models: the names of the others.
        workers: threads that take some tokens each.
    """

    def __init__(self, tokens: int, reference: str, models: Sequence[str], workers: Workers) -> None:
        self._reference, self._models, self._workers = reference, tuple(models), workers
        self._most = {name: torch.full((tokens,), -torch.inf, dtype=torch.float64) for name in (reference, *models)}
        self._sums = {name: torch.zeros(tokens, dtype=torch.float64) for name in (reference, *models)}
        self._differences = {name: torch.zeros(tokens, dtype=torch.float64) for name in models}

    @staticmethod
    def rows(count: int) -> list[slice]:
        """The rows of a head of `count` rows, in the parts that `add` takes."""
        return [slice(first, min(first + _MOST_ROWS, count)) for first in range(0, count, _MOST_ROWS)]

    def add(self, first: int, logits: Mapping[str, torch.Tensor]) -> None:
        """Count some more rows of the head; the result does not depend on the number of threads.

        Args:
            first: of the tokens.
            logits: float32 [t, n] of every model, for tokens first .. first + t - 1.
        """
        count = len(logits[self._reference])
        self._workers.map(
            lambda start: self._add(first, slice(start, min(start + _PIECE_TOKENS, count)), logits), range(0, count, _PIECE_TOKENS)
        )

    def of(self, model: str) -> torch.Tensor:
        """float64 [T], in nats, at least 0, once all rows were added."""
        log_sums = {name: self._sums[name].log() + self._most[name] for name in (self._reference, model)}
        mean = self._differences[model] / self._sums[self._reference]
        return (mean + log_sums[model] - log_sums[self._reference]).clamp_min(0.0)  # below zero is rounding error

    def _add(self, first: int, piece: slice, logits: Mapping[str, torch.Tensor]) -> None:
        tokens = slice(first + piece.start, first + piece.stop)
        z = logits[self._reference][piece].double()
        scale, p = self._accumulate(self._reference, tokens, z)
        for name in self._models:
            w = logits[name][piece].double()
            self._accumulate(name, tokens, w)
            differences = self._differences[name]
            differences[tokens] = differences[tokens] * scale + (p * (z - w)).sum(1)

    def _accumulate(self, name: str, tokens: slice, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(factor of what was added before, exp of the new logits relative to the largest so far)."""
        most, sums = self._most[name], self._sums[name]
        largest = torch.maximum(most[tokens], z.amax(1))
        scale = (most[tokens] - largest).exp()
        exponentials = (z - largest[:, None]).exp()
        sums[tokens] = sums[tokens] * scale + exponentials.sum(1)
        most[tokens] = largest
        return scale, exponentials
