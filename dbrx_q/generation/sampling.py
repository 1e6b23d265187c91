"""From logits to the next token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dbrx_q.errors import RequestError

__all__ = ["SamplingParams", "sample"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the default is greedy decoding.

    The fields apply in this order: repetition_penalty, temperature, top_k, top_p, min_p. Then a token is drawn from what is left.

        SamplingParams(temperature=0.7, top_p=0.9, seed=1)

    Raises:
        RequestError: a value out of range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token and ignores the fields below, except for `repetition_penalty`."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this total probability (Holtzman et al. 2020, nucleus sampling); 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens that are less probable than this share of the most probable token (Nguyen et al. 2024); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide the positive logits, and multiply the negative logits, of tokens that the sequence already has (Keskar et al. 2019, CTRL,
    section 4.1); 1 changes nothing."""
    seed: int | None = None
    """Sequence i of a batch draws with the seed `seed + i`; None for a random seed."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0 and math.isfinite(self.temperature), "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (keep all) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty > 0 and math.isfinite(penalty), "above 0 (1 changes nothing)")

    def generators(self, n: int) -> list[torch.Generator]:
        """One random number generator for each of `n` sequences."""
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [torch.Generator().manual_seed((first + i) % (1 << 63)) for i in range(n)]


def sample(
    logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator, excluded: torch.Tensor | None = None
) -> int:
    """The next token of one sequence.

    Args:
        logits: float32 [V], on any device.
        params: how to choose.
        seen: the tokens of the sequence so far, prompt included, for the repetition penalty.
        generator: draws the token; not used at temperature 0.
        excluded: bool [V] on the device of `logits`, True for tokens that must not be chosen; None for none.
    """
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    if params.temperature > 0 or params.repetition_penalty != 1:
        logits = logits.cpu()  # the generator is on the CPU, so that every device draws the same
    if params.repetition_penalty != 1 and seen:
        ids = torch.tensor(sorted(set(seen)))
        penalty, unpenalized = params.repetition_penalty, logits[ids]
        logits = logits.index_copy(0, ids, torch.where(unpenalized > 0, unpenalized / penalty, unpenalized * penalty))
    if params.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / params.temperature  # at most 0, so that a small temperature cannot overflow
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        surplus = ordered.cumsum(-1) - ordered >= params.top_p  # the token that reaches top_p stays
        probabilities = probabilities.index_fill(0, ids[surplus], 0.0)
    if params.min_p > 0:
        probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(name: str, value: float, valid: bool, rule: str) -> None:
    if not valid:
        raise RequestError(f"{name} must be {rule}; found {value}")
