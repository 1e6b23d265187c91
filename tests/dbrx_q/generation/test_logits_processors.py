"""Every processor gives transformers' tokens, with greedy decoding, sampling and beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM

from .pairs import ENDS, compare, make_pair

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def allowed(prompt: int, ids: torch.Tensor) -> list[int]:
    return [prompt + 5, prompt + 20, int(ids[-1]), int(ids.sum()) % 97]


PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[3], [4, 8], [68], [5]]},
    {"sequence_bias": {(3,): 4.0, (68,): -9.0, (68, 3): 7.0}},
    {"sequence_bias": [[[3], 4.0], [[68], -9.0]]},
    {"suppress_tokens": [3, 7, 20, 68]},
    {"begin_suppress_tokens": [68, 3]},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [11, 5]},
    {"exponential_decay_length_penalty": (3, 1.5)},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"prefix_allowed_tokens_fn": allowed},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "suppress_tokens": [9], "renormalize_logits": True},
]


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=["greedy", "beams", "sampling"]
)
@pytest.mark.parametrize("arguments", PROCESSORS, ids=lambda value: "+".join(value))
def test_a_processor_gives_the_tokens_of_transformers(pair: Pair, arguments: dict[str, Any], mode: dict[str, Any]) -> None:
    compare(pair, {"max_new_tokens": 9, **ENDS, **arguments, **mode})


def test_forced_bos_token_id_follows_a_prompt_of_one_token(pair: Pair) -> None:
    result = compare(pair, {"max_new_tokens": 5, "forced_bos_token_id": 9}, {"input_ids": torch.tensor([[3]])})
    assert result[0, 1] == 9
