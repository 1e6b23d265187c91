"""transformers' generate on a packed checkpoint, its streamers and pipelines."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from dbrx_q import DbrxForCausalLM, generate

NEW = 12


@pytest.fixture(scope="module")
def greedy(in_transformers: Any, ids: torch.Tensor) -> list[int]:
    """The tokens that greedy decoding adds to the first sequence."""
    return _generated(in_transformers, ids[:1], do_sample=False)[0]


def _generated(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()


def test_greedy_tokens_are_those_of_our_generate(quantized_nano: Path, ids: torch.Tensor, greedy: list[int]) -> None:
    native = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)
    ours = generate(native, [ids[0].tolist()], max_new_tokens=NEW, eos_token_ids=[])
    assert greedy == list(ours[0].token_ids)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["prompt lookup", "static cache", "no cache"],
)
def test_other_ways_to_decode_give_the_greedy_tokens(
    in_transformers: Any, ids: torch.Tensor, greedy: list[int], options: dict[str, Any]
) -> None:
    assert _generated(in_transformers, ids[:1], do_sample=False, **options)[0] == greedy


def test_assisted_decoding_gives_the_greedy_tokens(nano: Path, in_transformers: Any, ids: torch.Tensor, greedy: list[int]) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32)
    assert _generated(in_transformers, ids[:1], do_sample=False, assistant_model=assistant)[0] == greedy


def test_beams_are_at_least_as_likely(in_transformers: Any, ids: torch.Tensor, greedy: list[int]) -> None:
    beams = _generated(in_transformers, ids[:1], do_sample=False, num_beams=4)[0]

    def likelihood(tokens: list[int]) -> float:
        logits = in_transformers(torch.cat((ids[:1], torch.tensor([tokens])), 1)).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        return float(logits.gather(-1, torch.tensor(tokens)[:, None]).sum())

    assert likelihood(beams) >= likelihood(greedy)


def test_sampling_follows_its_seed(in_transformers: Any, ids: torch.Tensor) -> None:
    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return _generated(in_transformers, ids, do_sample=True, top_k=50)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_batch_gives_the_tokens_of_each_sequence(in_transformers: Any, ids: torch.Tensor, greedy: list[int]) -> None:
    assert _generated(in_transformers, ids, do_sample=False)[0] == greedy


def test_scores_and_recorded_outputs(in_transformers: Any, ids: torch.Tensor) -> None:
    out = in_transformers.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, output_hidden_states=True,
    )  # fmt: skip
    assert len(out.scores) == 3
    assert [len(states) for states in out.hidden_states] == [5] * 3


def test_a_streamer_gets_the_text_of_the_tokens(quantized_nano: Path, in_transformers: Any, ids: torch.Tensor, greedy: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quantized_nano)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)
    thread = threading.Thread(target=lambda: _generated(in_transformers, ids[:1], do_sample=False, streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(greedy, clean_up_tokenization_spaces=False)


def test_pipelines_by_folder_and_with_a_chat(quantized_nano: Path) -> None:
    generator = pipeline("text-generation", model=str(quantized_nano))
    (answer,) = generator("The old man", max_new_tokens=4, do_sample=False)
    generator.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (chat,) = generator([{"role": "user", "content": "The old man"}], max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("The old man")
    assert "The old man" + chat["generated_text"][-1]["content"] == answer["generated_text"]
