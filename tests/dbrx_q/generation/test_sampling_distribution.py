"""Tokens are drawn from the filtered distribution: of transformers with the same seed, and by a chi-square test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM

from .pairs import ENDS, compare, make_pair

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]
DRAWS = 4000

FILTERS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 5},
    {"top_k": 0, "temperature": 0.6},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "typical_p": 0.5},
    {"top_k": 0, "epsilon_cutoff": 0.03},
    {"top_k": 0, "eta_cutoff": 0.05},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.9},
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.mark.parametrize("arguments", FILTERS, ids=str)
def test_the_same_seed_of_torch_draws_the_tokens_of_transformers(pair: Pair, arguments: dict[str, Any]) -> None:
    compare(pair, {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3, **ENDS, **arguments})


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """(the statistic, its bound at five standard deviations) over tokens that 5 draws are expected of; infinite for an impossible token."""
    if bool((counts[probabilities == 0] > 0).any()):
        return float("inf"), 0.0
    frequent = probabilities * DRAWS >= 5
    expected = torch.cat((probabilities[frequent], probabilities[~frequent].sum()[None])) * DRAWS
    seen = torch.cat((counts[frequent], counts[~frequent].sum()[None]))
    statistic = ((seen - expected) ** 2 / expected.clamp(min=1)).sum()
    freedom = max(1, len(expected) - 1)
    return float(statistic), freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("arguments", FILTERS, ids=str)
def test_draws_follow_the_distribution_of_transformers(pair: Pair, arguments: dict[str, Any]) -> None:
    ids = torch.tensor([[4, 8, 15]])
    flags: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0}
    whole = pair[1].generate(ids, return_dict_in_generate=True, output_scores=True, **flags, **arguments)
    probabilities = whole.scores[0][0].double().softmax(-1)
    drawn = pair[0].generate(ids, num_return_sequences=DRAWS, seed=1, **flags, **arguments)[:, 3]
    counts = torch.bincount(drawn, minlength=97).double()
    statistic, bound = chi_square(counts, probabilities)
    assert statistic <= bound
    if arguments != {"top_k": 0}:  # without the filters the same draws are rejected
        plain = pair[1].generate(ids, return_dict_in_generate=True, output_scores=True, **flags, top_k=0).scores[0][0].double().softmax(-1)
        statistic, bound = chi_square(counts, plain)
        assert statistic > bound


def test_seed_and_generator_repeat_the_tokens(pair: Pair) -> None:
    ids = torch.tensor([[4, 8, 15]])
    arguments: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 4}
    first = pair[0].generate(ids, seed=3, **arguments)
    assert torch.equal(pair[0].generate(ids, seed=3, **arguments), first)
    assert torch.equal(pair[0].generate(ids, generator=torch.Generator().manual_seed(3), **arguments), first)
    assert not torch.equal(pair[0].generate(ids, seed=4, **arguments), first)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    pair[0].generate(ids, seed=3, **arguments)
    assert torch.equal(torch.rand(1), expected)
