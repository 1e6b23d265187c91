"""How far one distribution over the next token is from another, token by token, in float64.

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
    """What a model predicts for P tokens.

    log_probs: float64 [P, V] where ids is None; else [P, K], of the tokens ids, int64 [P, K], likeliest first: all others together have the
    rest of the probability. nll: float64 [P], negative log-likelihood of the token that came. top: int64 [P, at least 5], the likeliest
    first, where log_probs are too coarse to tell; None to look there.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor | None
    nll: torch.Tensor
    top: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Distribution:
        """From logits [P, V] and the tokens that came, int64 [P]."""
        log_probs = logits.double().log_softmax(-1)
        return cls(log_probs, None, -log_probs.gather(-1, targets.to(logits.device)[:, None])[:, 0])

    def on(self, device: torch.device) -> Distribution:
        """The same on another device."""
        ids, top = (None if part is None else part.to(device) for part in (self.ids, self.top))
        return Distribution(self.log_probs.to(device), ids, self.nll.to(device), top)

    def likeliest(self, count: int) -> torch.Tensor:
        """int64 [P, count], likeliest first; of equals the lower id."""
        known = self.ids if self.top is None else self.top
        if known is not None:
            return known[:, :count]
        best = self.log_probs.topk(min(count + 1, self.log_probs.shape[-1]), -1)
        ordered = best.indices[:, :count]
        tied = (best.values[:, 1:] == best.values[:, :-1]).any(-1)
        if tied.any():  # topk leaves the order of equals open
            ordered[tied] = self.log_probs[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return ordered


@dataclass(frozen=True)
class TokenScores:
    """Of P predicted tokens, one after the other; numpy arrays [P].

    nll_reference, nll: negative log-likelihood of the token that came, in nats, float64. kl: KL(reference || model), in nats, float64.
    top5: share of the reference's five likeliest that are among the model's five, float32. reference_top, top: the likeliest, int32.
    """

    nll_reference: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    top5: np.ndarray
    reference_top: np.ndarray
    top: np.ndarray

    @classmethod
    def room(cls, tokens: int) -> TokenScores:
        """For so many tokens, to be filled by `put`."""
        return cls(*(np.zeros(tokens, kind) for kind in (np.float64, np.float64, np.float64, np.float32, np.int32, np.int32)))

    def put(self, at: int, part: TokenScores) -> None:
        """Copy the scores of the tokens from place `at` on."""
        for field in fields(self):
            values = getattr(part, field.name)
            getattr(self, field.name)[at : at + len(values)] = values

    def first(self, tokens: int) -> TokenScores:
        """Those of the first so many tokens, in the same memory."""
        return TokenScores(*(getattr(self, field.name)[:tokens] for field in fields(self)))


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 [P] of logits [P, V] and the tokens that came, int64 [P]; as `Distribution.of` has it."""
    return Distribution.of(logits, targets).nll


def scores(reference: Distribution, model: Distribution) -> TokenScores:
    """The model's predictions beside the reference's.

    KL(p || q) = sum of p (ln p - ln q) over the vocabulary. Where the reference kept K tokens alone, all others count as one event: a lower
    bound, since joining events never makes a divergence larger (Cover and Thomas, Elements of Information Theory, 2.7).
    """
    assert model.ids is None, "a model predicts over its whole vocabulary"
    log_p, log_q = reference.log_probs, model.log_probs
    if reference.ids is not None:
        log_q = log_q.gather(-1, reference.ids)  # [P, K]
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)  # [P]
    if reference.ids is not None:
        kl = kl + _rest(p.sum(-1), log_q.exp().sum(-1))
    ours, theirs = model.likeliest(AGREEING), reference.likeliest(AGREEING)
    top5 = (ours[:, :, None] == theirs[:, None, :]).any(1).float().mean(-1)
    as_int = [top[:, 0].to(torch.int32) for top in (theirs, ours)]
    # Below zero there is only rounding.
    return TokenScores(*(x.cpu().numpy() for x in (reference.nll, model.nll, kl.clamp(min=0.0), top5, *as_int)))


def _rest(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The term of all tokens that the reference did not keep; p, q: the probability of those that it kept."""
    p, q = (1 - p).clamp(min=0.0), (1 - q).clamp(min=torch.finfo(torch.float64).eps)
    return torch.where(p > 0, p * (p.clamp(min=torch.finfo(torch.float64).tiny) / q).log(), torch.zeros_like(p))


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error: standard deviation (n - 1) over the root of n; 0 of a single value."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
