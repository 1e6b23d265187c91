"""Divergence between two models' predictions of the next token, token by token, in float64.

Dimension letters: `P` predicted tokens, `V` vocabulary, `K` tokens that a reference keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

__all__ = ["AGREEING", "Distribution", "TokenScores", "mean_and_stderr", "negative_log_likelihood", "scores"]

AGREEING = 5
"""How many of the likeliest tokens are compared."""


@dataclass(frozen=True)
class Distribution:
    """What a model predicts for P tokens: log-probabilities of the whole vocabulary, or of the K likeliest tokens alone."""

    log_probs: torch.Tensor
    """float64 [P, V] where `ids` is None; otherwise [P, K], of the tokens `ids`."""
    ids: torch.Tensor | None
    """int64 [P, K], likeliest first; all other tokens together have the rest of the probability. None for the whole vocabulary."""
    nll: torch.Tensor
    """float64 [P], negative log-likelihood of the actual token, in nats."""
    top: torch.Tensor | None = None
    """int64 [P, at least 5], likeliest tokens first, where `log_probs` are too coarse to order them; None to order by `log_probs`."""

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Distribution:
        """The distribution of logits [P, V]; targets: the actual tokens, int64 [P]."""
        log_probs = logits.double().log_softmax(-1)
        return cls(log_probs, None, -log_probs.gather(-1, targets.to(logits.device)[:, None])[:, 0])

    def on(self, device: torch.device) -> Distribution:
        """A copy on another device."""
        ids, top = (None if part is None else part.to(device) for part in (self.ids, self.top))
        return Distribution(self.log_probs.to(device), ids, self.nll.to(device), top)

    def likeliest(self, count: int) -> torch.Tensor:
        """int64 [P, count], likeliest tokens first; ties go to the lower id."""
        known = self.ids if self.top is None else self.top
        if known is not None:
            return known[:, :count]
        best = self.log_probs.topk(min(count + 1, self.log_probs.shape[-1]), -1)
        ordered = best.indices[:, :count]
        tied = (best.values[:, 1:] == best.values[:, :-1]).any(-1)
        if tied.any():  # topk leaves the order of ties open
            ordered[tied] = self.log_probs[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return ordered


@dataclass(frozen=True)
class TokenScores:
    """Scores of P predicted tokens in the order of the text; numpy arrays [P]."""

    nll_reference: np.ndarray
    """float64, the reference's negative log-likelihood of the actual token, in nats."""
    nll: np.ndarray
    """float64, the model's negative log-likelihood of the actual token, in nats."""
    kl: np.ndarray
    """float64, KL(reference || model), in nats."""
    top5: np.ndarray
    """float32, share of the reference's five likeliest tokens that are among the model's five."""
    reference_top: np.ndarray
    """int32, the reference's likeliest token."""
    top: np.ndarray
    """int32, the model's likeliest token."""

    @classmethod
    def zeros(cls, tokens: int) -> TokenScores:
        """Memory for the scores of `tokens` tokens, which `put` fills."""
        return cls(*(np.zeros(tokens, kind) for kind in (np.float64, np.float64, np.float64, np.float32, np.int32, np.int32)))

    def put(self, start: int, part: TokenScores) -> None:
        """Copy `part` to the scores of the tokens from index `start` on."""
        for field in fields(self):
            values = getattr(part, field.name)
            getattr(self, field.name)[start : start + len(values)] = values

    def first(self, tokens: int) -> TokenScores:
        """Scores of the first `tokens` tokens; a view, not a copy."""
        return TokenScores(*(getattr(self, field.name)[:tokens] for field in fields(self)))


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 [P] in nats, from logits [P, V] and the actual tokens, int64 [P]; computed as in `Distribution.of`."""
    return Distribution.of(logits, targets).nll


def scores(reference: Distribution, model: Distribution) -> TokenScores:
    """Compare the model's predictions with the reference's.

    KL(p || q) = sum of p (ln p - ln q) over the vocabulary. If the reference has only K tokens, all others count as one event, which gives
    a lower bound: merging events never increases a divergence (Cover and Thomas, Elements of Information Theory, 2.7).
    """
    assert model.ids is None, "a model predicts over its whole vocabulary"
    log_p, log_q = reference.log_probs, model.log_probs
    if reference.ids is not None:
        log_q = log_q.gather(-1, reference.ids)  # [P, K]
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)  # [P]
    if reference.ids is not None:
        kl = kl + _omitted_tokens_term(p.sum(-1), log_q.exp().sum(-1))
    ours, theirs = model.likeliest(AGREEING), reference.likeliest(AGREEING)
    top5 = (ours[:, :, None] == theirs[:, None, :]).any(1).float().mean(-1)
    likeliest = [top[:, 0].to(torch.int32) for top in (theirs, ours)]
    # A divergence below zero is rounding error.
    return TokenScores(*(x.cpu().numpy() for x in (reference.nll, model.nll, kl.clamp(min=0.0), top5, *likeliest)))


def _omitted_tokens_term(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The term of all tokens that the reference did not keep; p, q: both models' probability of the tokens that it kept."""
    p, q = (1 - p).clamp(min=0.0), (1 - q).clamp(min=torch.finfo(torch.float64).eps)
    return torch.where(p > 0, p * (p.clamp(min=torch.finfo(torch.float64).tiny) / q).log(), torch.zeros_like(p))


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error: standard deviation (n - 1) over the square root of n; 0 for a single value."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
