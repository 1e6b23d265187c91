"""Beam search gives the sequences, scores and beam indices of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM
from dbrx_q.errors import RequestError

from .pairs import ENDS, compare, make_pair, padded_prompts

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]


@pytest.fixture(scope="module", params=[0, 1, 2])
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 2.5, -1.0, 0.0])
def test_length_penalty_and_early_stopping(pair: Pair, early_stopping: bool | str, length_penalty: float) -> None:
    ends = [5, 11, 3, 20, 40, 60]
    arguments = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": length_penalty, "early_stopping": early_stopping}
    compare(pair, {**arguments, "eos_token_id": ends, "pad_token_id": 0})


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2, "eos_token_id": None},
        {"num_beams": 5, "num_return_sequences": 5, **ENDS},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True, "top_k": 9, **ENDS},
        {"num_beams": 3, "use_cache": False, **ENDS},
        {"num_beams": 2, "eos_token_id": 9, "pad_token_id": None},
    ],
    ids=str,
)
def test_num_beams_and_num_return_sequences(pair: Pair, arguments: dict[str, Any]) -> None:
    compare(pair, {"max_new_tokens": 10, **arguments})


def test_sequences_scores_and_beam_indices(pair: Pair) -> None:
    flags = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 4, "num_return_sequences": 3, **ENDS}
    ours, theirs = (model.generate(**padded_prompts(), max_new_tokens=9, **flags) for model in pair)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)


@pytest.mark.parametrize("mode", [{"num_beams": 4, "num_return_sequences": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_compute_transition_scores(pair: Pair, mode: dict[str, Any]) -> None:
    torch.manual_seed(1)
    flags = {"return_dict_in_generate": True, "output_scores": True, **mode, **ENDS}
    output = pair[1].generate(**padded_prompts(), max_new_tokens=9, **flags)
    arguments = output.sequences, output.scores, output.get("beam_indices")
    for normalize_logits in (False, True):
        ours, theirs = (model.compute_transition_scores(*arguments, normalize_logits=normalize_logits) for model in pair)
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RequestError, match="needs the scores of every new token; found None"):
        pair[0].compute_transition_scores(output.sequences, None)


def test_stopping_criteria_end_beams(pair: Pair) -> None:
    def criterion(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return ids[:, -1] % 3 == 0

    criteria = transformers.StoppingCriteriaList([criterion])
    compare(pair, {"max_new_tokens": 9, "num_beams": 3, "stopping_criteria": criteria, **ENDS})
