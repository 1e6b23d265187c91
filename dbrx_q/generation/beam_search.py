"""Beam search: the best continuations of each prompt by the sum of their log probabilities.

Scores, ties and the condition that ends the search are those of transformers.

Dimension letters: `B` prompts, `K` beams of a prompt, `C` candidates of a step, `L` columns of a finished sequence, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["BeamSettings", "Beams"]

# The score of a beam that must not be chosen: so low that any sum of log probabilities is above it, and finite, so that ties have an order.
_NEVER = -1.0e9


@dataclass(frozen=True)
class BeamSettings:
    """How beams are chosen."""

    beams: int
    """K."""
    ends: int
    """Tokens that end a sequence."""
    early_stopping: bool | str
    """True, False or "never"; see `GenerationConfig`."""
    length_penalty: float
    """Exponent of the length in a complete beam's score."""
    sample: Callable[[torch.Tensor, int], torch.Tensor] | None
    """Draws indices [B, C] without replacement from probabilities [B, K * V]; None to take the best ones."""

    @property
    def candidates(self) -> int:
        """C: enough that K of them go on even if every beam's best continuations are all end tokens."""
        return max(2, 1 + self.ends) * self.beams


class Beams:
    """The running and the complete beams of every prompt.

    Args:
        ids: int64 [B * K, S], the prompts, each K times.
        max_length: L.
        fill: the token that stands after the end of a sequence.
        settings: how beams are chosen.
    """

    def __init__(self, ids: torch.Tensor, max_length: int, fill: int, settings: BeamSettings) -> None:
        K, (rows, S) = settings.beams, ids.shape
        B, device = rows // K, ids.device
        self._settings, self._prompt, self._max_length, self._length = settings, S, max_length, S
        self._running = torch.full((B, K, max_length), fill, dtype=torch.int64, device=device)
        self._running[:, :, :S] = ids.view(B, K, S)
        self._complete = self._running.clone()
        # All beams of a prompt begin alike: only the first counts at the first step.
        self._running_scores = torch.full((B, K), _NEVER, device=device)
        self._running_scores[:, 0] = 0
        self._complete_scores = torch.full((B, K), _NEVER, device=device)
        self._is_complete = torch.zeros(B, K, dtype=torch.bool, device=device)
        self._can_improve = torch.ones(B, 1, dtype=torch.bool, device=device)
        self._running_rows = torch.full((B, K, max_length - S), -1, dtype=torch.int32, device=device)
        self._complete_rows = self._running_rows.clone()
        self.finished = False

    @property
    def ids(self) -> torch.Tensor:
        """int64 [B * K, n], the running beams."""
        return self._running[:, :, : self._length].flatten(0, 1)

    def advance(self, log_probs: torch.Tensor, ended: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[int], list[int]]:
        """Choose the next token of every beam; returns (the row that each running beam continues, its new token), [B * K] each.

        Args:
            log_probs: processed log probabilities, float32 [B * K, V].
            ended: for sequences int64 [B * C, n], whether each has ended, bool [B * C].
        """
        settings, (B, K), V = self._settings, self._running_scores.shape, log_probs.shape[1]
        scores = (log_probs.view(B, K, V) + self._running_scores[:, :, None]).view(B, K * V)
        if settings.sample is None:
            best, indices = scores.topk(settings.candidates)
        else:
            indices = settings.sample(scores.softmax(-1), settings.candidates)
            best, order = scores.gather(1, indices).sort(-1, descending=True)
            indices = indices.gather(1, order)
        beam = indices // V  # [B, C]
        sequences, rows = _take(self._running, beam), _take(self._running_rows, beam)
        sequences[:, :, self._length] = indices % V
        rows[:, :, self._length - self._prompt] = beam + torch.arange(B, device=beam.device)[:, None] * K
        ends = ended(sequences[:, :, : self._length + 1].flatten(0, 1)).view(B, -1)

        goes_on = best + ends.float() * _NEVER
        chosen = goes_on.topk(K).indices
        self._running, self._running_rows = _take(sequences, chosen), _take(rows, chosen)
        self._running_scores = goes_on.gather(1, chosen)

        self._add_complete(sequences, rows, best, ends)
        position, self._length = self._length - self._prompt, self._length + 1
        self._update_state(ends)
        sources: list[int] = self._running_rows[:, :, position].flatten().tolist()
        tokens: list[int] = self._running[:, :, self._length - 1].flatten().tolist()
        return sources, tokens

    def _add_complete(self, sequences: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        """Keep the K best of the complete beams and those of the K best candidates that have just ended."""
        settings, K = self._settings, self._settings.beams
        just_ended = ends & (torch.arange(ends.shape[1], device=ends.device) < K)
        scores = scores / (self._length + 1 - self._prompt) ** settings.length_penalty
        full = self._is_complete.all(1, keepdim=True) & (settings.early_stopping is True)
        for excluded in (full, ~self._can_improve, ~just_ended):
            scores = scores + excluded.float() * _NEVER
        all_scores = torch.cat((self._complete_scores, scores), 1)
        kept = all_scores.topk(K).indices
        self._complete = _take(torch.cat((self._complete, sequences), 1), kept)
        self._complete_rows = _take(torch.cat((self._complete_rows, rows), 1), kept)
        self._is_complete = torch.cat((self._is_complete, just_ended), 1).gather(1, kept)
        self._complete_scores = all_scores.gather(1, kept)

    def _update_state(self, ends: torch.Tensor) -> None:
        """Whether a running beam can still become better than a complete one, and whether the search has ended."""
        settings = self._settings
        length = self._max_length if settings.early_stopping == "never" and settings.length_penalty > 0 else self._length
        best_possible = self._running_scores[:, :1] / (length - self._prompt) ** settings.length_penalty
        worst = torch.where(self._is_complete, self._complete_scores.min(1, keepdim=True).values, _NEVER)
        self._can_improve = self._can_improve & (best_possible > worst).any(1, keepdim=True)
        has_open = not (settings.early_stopping is True and bool(self._is_complete.all()))
        self.finished = not (bool(self._can_improve.any()) and has_open and not bool(ends.all()))

    def result(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The `count` best complete beams of each prompt: (int64 [B * count, n], scores [B * count], rows int32 [B * count, new])."""
        sequences = self._complete[:, :count].flatten(0, 1)
        rows = self._complete_rows[:, :count].flatten(0, 1)
        new = int((rows != -1).sum(1).max())
        return sequences[:, : self._prompt + new], self._complete_scores[:, :count].flatten(), rows[:, :new]


def _take(x: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """[B, C, n] from [B, K, n], by indices [B, C]."""
    return x.gather(1, beams[:, :, None].expand(-1, -1, x.shape[2]))
