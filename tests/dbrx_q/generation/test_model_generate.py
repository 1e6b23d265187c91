"""`model.generate` equals transformers' generate, token for token, for every argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, GenerationConfig, KVCache, generate
from dbrx_q.errors import RequestError, UnsupportedError

from .pairs import ENDS, VOCABULARY, compare, make_pair, padded_prompts

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def prompt() -> torch.Tensor:
    return torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 12},
        {"max_length": 15},
        {"max_new_tokens": 12, **ENDS},
        {"max_new_tokens": 12, "use_cache": False, **ENDS},
        {"max_new_tokens": 12, "min_new_tokens": 9, **ENDS},
        {"max_new_tokens": 12, "min_length": 15, **ENDS},
        {"max_new_tokens": 12, "eos_token_id": 9},
        {"max_new_tokens": 12, "eos_token_id": None},
        {"max_new_tokens": 6, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_greedy_decoding_with_lengths_and_ends(pair: Pair, arguments: dict[str, Any]) -> None:
    compare(pair, arguments)


def test_end_tokens_end_a_sequence_and_padding_follows(pair: Pair) -> None:
    ours = pair[0]
    plain = ours.generate(**padded_prompts(), max_new_tokens=12)
    end = int(plain[0, 9])  # the third new token of the first sequence
    ended = compare(pair, {"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0})
    first = plain[0, 7:].tolist().index(end)
    assert ended[0, 7 + first + 1 :].tolist() == [0] * (ended.shape[1] - 8 - first)
    assert first < 11


def test_without_a_length_as_many_tokens_as_transformers(pair: Pair) -> None:
    with pytest.warns(UserWarning, match="20 tokens are generated"):
        ours = pair[0].generate(prompt())
    with pytest.warns(UserWarning, match="default `max_length`"):
        theirs = pair[1].generate(prompt())
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, 30)


def test_inputs_by_position_by_name_and_as_lists(pair: Pair) -> None:
    expected = pair[0].generate(prompt(), max_new_tokens=4)
    assert torch.equal(pair[0].generate(input_ids=prompt(), max_new_tokens=4), expected)
    assert torch.equal(pair[0].generate(inputs=prompt().tolist(), max_new_tokens=4), expected)
    assert expected.dtype == torch.int64
    expected += 1  # an ordinary tensor, which may be changed


def test_bos_token_id_begins_a_call_without_inputs(pair: Pair) -> None:
    compare(pair, {"max_new_tokens": 5, "bos_token_id": 7}, {})


def test_padding_is_inferred_from_pad_token_id(pair: Pair) -> None:
    ids = padded_prompts()["input_ids"]
    inferred = compare(pair, {"max_new_tokens": 8, "pad_token_id": 0}, {"input_ids": ids})
    assert torch.equal(inferred, pair[0].generate(**padded_prompts(), max_new_tokens=8))


def test_padding_on_the_right_is_skipped(pair: Pair) -> None:
    ids = torch.tensor([[4, 8, 15, 0, 0], [16, 23, 42, 8, 9]])
    mask = (ids != 0).long()
    expected = pair[0].generate(ids[:1, :3], max_new_tokens=6)[0, 3:]
    assert torch.equal(pair[0].generate(ids, attention_mask=mask, max_new_tokens=6)[0, 5:], expected)
    whole = pair[0].generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(whole.sequences[0, 5:], expected)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True}], ids=str)
def test_output_objects_have_the_fields_of_transformers(pair: Pair, beams: dict[str, Any]) -> None:
    """return_dict_in_generate with output_scores, output_logits, output_hidden_states and output_attentions."""
    flags = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        outputs.append(model.generate(**padded_prompts(), max_new_tokens=6, return_dict_in_generate=True, **flags, **beams, **ENDS))
    ours, theirs = outputs
    assert type(ours).__name__ == type(theirs).__name__
    assert list(ours.keys()) == list(theirs.keys())
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    for name in ("hidden_states", "attentions"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert [layer.shape for layer in a] == [layer.shape for layer in b]
            torch.testing.assert_close(a[-1][-1, ..., -1, :], b[-1][-1, ..., -1, :], atol=1e-3, rtol=1e-3)
    assert ours.past_key_values.get_seq_length() == theirs.cache.get_seq_length()


def test_a_given_cache_is_continued(pair: Pair) -> None:
    """past_key_values and cache: with whole sequences, or with new tokens and a mask of both."""
    ours = pair[0]
    ids = torch.cat((padded_prompts()["input_ids"][1:], prompt()), 1)
    expected = ours.generate(ids, max_new_tokens=6)
    first = ours.generate(ids[:, :7], max_new_tokens=1, return_dict_in_generate=True)
    assert torch.equal(ours.generate(ids, past_key_values=first.past_key_values, max_new_tokens=6), expected)
    cache = KVCache(ours.config, 1, 40, dtype=ours.dtype)
    ours(ids[:, :7], past_key_values=cache)
    new = ours.generate(ids[:, 7:], attention_mask=torch.ones(1, ids.shape[1]), cache=cache, max_new_tokens=6)
    assert torch.equal(new, expected[:, 7:])
    assert cache.lengths == [ids.shape[1] + 5]


def test_inputs_embeds_give_the_new_tokens(pair: Pair) -> None:
    ids = prompt()
    ours, theirs = (model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, **ENDS) for model in pair)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, pair[0].generate(ids, max_new_tokens=6, **ENDS)[:, 10:])
    for mode in ({}, {"num_beams": 3}):  # without a cache transformers forgets the embeddings after the first token
        embeddings = pair[0].get_input_embeddings()(ids)
        without_cache = pair[0].generate(inputs_embeds=embeddings, max_new_tokens=6, use_cache=False, **ENDS, **mode)
        assert torch.equal(without_cache, pair[0].generate(ids, max_new_tokens=6, **ENDS, **mode)[:, 10:])


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup_num_tokens_gives_the_same_tokens(pair: Pair, do_sample: bool) -> None:
    for tokens in (1, 3):
        mode = {"do_sample": True, "top_k": 1} if do_sample else {}  # of one token the draw is certain
        looked_up = pair[0].generate(prompt(), max_new_tokens=30, prompt_lookup_num_tokens=tokens, **mode)
        assert torch.equal(looked_up, pair[1].generate(prompt(), max_new_tokens=30))
    masked = {"input_ids": torch.cat((torch.zeros(1, 2, dtype=torch.int64), prompt()), 1), "attention_mask": torch.ones(1, 12)}
    masked["attention_mask"][:, :2] = 0
    compare(pair, {"max_new_tokens": 30, "prompt_lookup_num_tokens": 2}, masked)


def test_processors_see_the_columns_of_a_prompt_with_a_gap(pair: Pair) -> None:
    """With prompt lookup as without."""
    ids = torch.cat((prompt()[:, :4], torch.zeros(1, 3, dtype=torch.int64), prompt()[:, 4:]), 1)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    seen: list[list[list[int]]] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.tolist())
        return scores

    for mode in ({}, {"prompt_lookup_num_tokens": 2}):
        pair[0].generate(**inputs, max_new_tokens=4, logits_processor=[processor], **mode)
    assert seen[:4] == seen[4:]


def test_a_call_with_prompt_lookup_returns_its_cache(pair: Pair) -> None:
    """Without padding, from which a later call goes on."""
    expected = pair[0].generate(prompt(), max_new_tokens=16)
    lookup = {"prompt_lookup_num_tokens": 2, "return_dict_in_generate": True}
    first = pair[0].generate(prompt(), max_new_tokens=10, **lookup)
    assert list(first.keys()) == list(pair[1].generate(prompt(), max_new_tokens=10, **lookup).keys())
    assert first.cache.get_seq_length() == first.sequences.shape[1] - 1
    assert torch.equal(pair[0].generate(first.sequences, past_key_values=first.cache, max_new_tokens=6), expected)
    padded = {"input_ids": padded_prompts()["input_ids"][:1], "attention_mask": padded_prompts()["attention_mask"][:1]}
    assert pair[0].generate(**padded, max_new_tokens=3, **lookup).cache is None


def test_stopping_criteria_and_logits_processor_see_what_transformers_shows(pair: Pair) -> None:
    """Of both libraries: callables, and objects of transformers."""
    seen: list[tuple[Any, ...]] = []

    def criterion(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        seen.append((ids.shape, None if scores is None else len(scores)))
        return torch.tensor([ids.shape[1] > 9, ids.shape[1] > 11])

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((ids[0].tolist(), scores.shape))
        return scores.roll(1, -1)

    shown = []
    for model in pair:
        seen.clear()
        lists = transformers.LogitsProcessorList([processor]), transformers.StoppingCriteriaList([criterion])
        result = model.generate(**padded_prompts(), max_new_tokens=9, logits_processor=lists[0], stopping_criteria=lists[1], **ENDS)
        shown.append((list(seen), result.tolist()))
    assert shown[0] == shown[1]
    length = [transformers.MaxLengthCriteria(9)]
    assert pair[0].generate(prompt()[:, :4], max_new_tokens=20, stopping_criteria=length).shape == (1, 9)


def test_max_time_ends_after_the_current_step(pair: Pair) -> None:
    assert pair[0].generate(prompt(), max_new_tokens=90, max_time=1e-9).shape == (1, 11)


def test_generation_config_of_every_kind(pair: Pair, tmp_path: Path) -> None:
    """Ours, one of transformers, a dictionary; and defaults of the model."""
    ours = pair[0]
    expected = ours.generate(prompt(), max_new_tokens=4, repetition_penalty=1.8)
    values = {"max_new_tokens": 4, "repetition_penalty": 1.8}
    for config in (GenerationConfig(**values), transformers.GenerationConfig(**values), values):
        assert torch.equal(ours.generate(prompt(), generation_config=config), expected)
    config = GenerationConfig(**values, sequence_bias={(1, 2): 0.5})
    config.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.max_new_tokens, read.repetition_penalty) == (4, 1.8)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).repetition_penalty == 1.8
    assert GenerationConfig.from_dict(config.to_dict()) == config
    assert config.update(max_new_tokens=5, foo=1) == {"foo": 1}
    ours.generation_config.update(max_new_tokens=4)
    try:
        assert ours.generate(prompt()).shape == (1, 14)
    finally:
        ours.generation_config.update(max_new_tokens=None)


def test_defaults_come_from_generation_config_json(nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(nano)
    assert model.generation_config.eos_token_id == [4092, 4094]
    assert model.generation_config.pad_token_id == 4095
    whole = generate(model, [[5, 6, 7]], max_new_tokens=8)[0].token_ids
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8)[0, 3 : 3 + len(whole)].tolist() == whole


def test_kv_format_quantizes_the_cache(pair: Pair) -> None:
    whole = pair[0].generate(prompt(), max_new_tokens=6, kv_format="int8", return_dict_in_generate=True)
    assert whole.cache.format == "int8"
    assert torch.equal(whole.sequences, pair[0].generate(prompt(), max_new_tokens=6, kv_format="int8"))


def test_the_function_generate_takes_tensors(pair: Pair) -> None:
    ours, inputs = pair[0], padded_prompts()
    expected = ours.generate(**inputs, max_new_tokens=6)[:, 7:].tolist()
    results = generate(ours, inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6)
    assert [result.token_ids for result in results] == expected
    rows = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert [result.token_ids for result in generate(ours, rows, max_new_tokens=6)] == expected
    with pytest.raises(RequestError, match=r"attention_mask must be \[2, 7\]"):
        generate(ours, inputs["input_ids"], attention_mask=torch.ones(2, 6))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"num_beams": 2, "streamer": object()}, "a streamer needs num_beams=1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams, 2; found 3"),
        ({"num_return_sequences": 2}, "found num_return_sequences=2"),
        ({"min_new_tokens": 9}, "must not exceed the longest; found 19 and 14"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; found 0"),
        ({"max_new_tokens": None, "max_length": 10}, "max_length must exceed the 10 tokens"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0 with do_sample=True; found 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be from 0 to 1; found 1.5"),
        ({"attention_mask": torch.ones(1, 9)}, r"attention_mask must be \[1, 10\]"),
        ({"attention_mask": torch.zeros(1, 10)}, "hides all of prompt 0"),
        ({"stop_strings": "x"}, "need the model's tokenizer"),
        ({"seed": 1, "generator": torch.Generator()}, "generator or seed"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping must be"),
        ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, "takes one prompt and num_beams=1"),
        ({"bad_words_ids": [[VOCABULARY]]}, "bad_words_ids must hold token ids from 0 to 96"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"max_time": -1}, "max_time must be"),
        ({"attention_mask": torch.full((1, 10), -1e9)}, "must hold 1 for tokens and 0 for padding; found -1000000000.0"),
        ({"num_beams": 0}, "num_beams must be a whole number, at least 1; found 0"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number, at least 1; found 0"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number, at least 0; found -1"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number; found '5'"),
        ({"max_new_tokens": 5.0}, "max_new_tokens must be a whole number; found 5.0"),
        ({"repetition_penalty": "2"}, "repetition_penalty must be a number; found '2'"),
        ({"forced_eos_token_id": VOCABULARY}, "forced_eos_token_id must be a token id from 0 to 96; found 97"),
        ({"forced_eos_token_id": 3, "suppress_tokens": [3, 4]}, "a token that suppress_tokens does not ban; found 3"),
        ({"exponential_decay_length_penalty": 3, "eos_token_id": 3}, r"must be \(start, factor\); found 3"),
        ({"logits_processor": [3]}, r"logits_processor must be a list of callables; found \[3\]"),
        ({"stopping_criteria": len}, "stopping_criteria must be a list of callables"),
        ({"streamer": object()}, "must have the methods put and end; found object"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_impossible_arguments_are_refused(pair: Pair, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        pair[0].generate(prompt(), **({"max_new_tokens": 4} | arguments))


def test_impossible_inputs_are_refused(pair: Pair) -> None:
    ours = pair[0]
    with pytest.raises(RequestError, match="found neither"):
        ours.generate(max_new_tokens=3)
    with pytest.raises(RequestError, match="takes inputs or input_ids"):
        ours.generate(prompt(), input_ids=prompt(), max_new_tokens=3)
    with pytest.raises(RequestError, match="from 0 to 96; found 97"):
        ours.generate(torch.tensor([[97]]), max_new_tokens=3)
    with pytest.raises(RequestError, match="lists of one length"):
        ours.generate([[1, 2], [3]], max_new_tokens=3)
    with pytest.raises(RequestError, match="context of 128 tokens; the longest has 128"):
        ours.generate(torch.ones(1, 128, dtype=torch.int64), max_new_tokens=3)
    with pytest.raises(RequestError, match="must hold 1 sequences"):
        ours.generate(prompt(), past_key_values=KVCache(ours.config, 3, 20, dtype=ours.dtype), max_new_tokens=3)
    cache = ours(prompt()).cache
    with pytest.raises(RequestError, match="found 10 columns with 10 in the cache"):
        ours.generate(prompt(), past_key_values=cache, max_new_tokens=3)


def test_the_context_ends_generation_with_a_warning(pair: Pair) -> None:
    with pytest.warns(UserWarning, match="context of 128 tokens ends generation after 8 of 20") as caught:
        assert pair[0].generate(torch.ones(1, 120, dtype=torch.int64), max_new_tokens=20).shape == (1, 128)
    assert caught[0].filename == __file__, "the line of the caller"


def test_unknown_arguments_name_the_nearest(pair: Pair) -> None:
    with pytest.raises(TypeError, match=r"'max_new_token'\. Did you mean 'max_new_tokens'"):
        pair[0].generate(prompt(), max_new_token=3)
    with pytest.raises(UnsupportedError, match="does not support penalty_alpha"):
        pair[0].generate(prompt(), max_new_tokens=3, penalty_alpha=0.6)
    with pytest.raises(UnsupportedError, match="does not support assistant_model"):
        pair[0].generate(prompt(), max_new_tokens=3, assistant_model=pair[0])
    with pytest.raises(UnsupportedError, match="cache_implementation must be"):
        pair[0].generate(prompt(), max_new_tokens=3, cache_implementation="offloaded")
    with pytest.raises(UnsupportedError, match="does not support guidance_scale"):
        pair[0].generate(prompt(), generation_config=transformers.GenerationConfig(max_new_tokens=3, guidance_scale=2.0))


def test_every_argument_of_transformers_is_known(pair: Pair) -> None:
    """Each has an effect, is neutral, or is refused: none is an unknown name."""
    config = transformers.GenerationConfig()
    known = {name for name in vars(config) if not name.startswith("_")} - {"transformers_version"}
    for name in sorted(known):
        pair[0].generate(prompt(), **({"max_new_tokens": 1} | ({} if name == "max_new_tokens" else {name: None})))


def test_arguments_without_effect_are_warned_of(pair: Pair) -> None:
    with pytest.warns(UserWarning, match="temperature=0.5 has no effect without do_sample=True") as caught:
        pair[0].generate(prompt(), max_new_tokens=1, temperature=0.5)
    assert caught[0].filename == __file__, "the line of the caller"
    with pytest.warns(UserWarning, match="output_scores=True has no effect without return_dict_in_generate=True"):
        pair[0].generate(prompt(), max_new_tokens=1, output_scores=True)


def test_generation_config_is_saved_with_the_model(pair: Pair, tmp_path: Path) -> None:
    ours = make_pair()[0]
    ours.generation_config.update(temperature=0.5, eos_token_id=[5, 11])
    ours.save_pretrained(tmp_path)
    again = DbrxForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config == ours.generation_config
    assert again.eos_token_ids == (5, 11)


@pytest.mark.parametrize("arguments", [{"suppress_tokens": list(range(4096))}, {"temperature": 1e-40}])
def test_sampling_without_a_token_to_draw_is_refused(nano: Path, arguments: dict[str, Any]) -> None:
    model = DbrxForCausalLM.from_pretrained(nano)
    with pytest.raises(RequestError, match="sampling needs finite scores and one token"):
        model.generate(torch.tensor([[5, 6]]), do_sample=True, max_new_tokens=2, **arguments)


@pytest.mark.parametrize("seed", [1.5, 1 << 70])
def test_a_seed_must_be_a_whole_number_of_64_bits(nano: Path, seed: Any) -> None:
    with pytest.raises(RequestError, match="seed must be a whole number"):
        DbrxForCausalLM.from_pretrained(nano).generate(torch.tensor([[5, 6]]), do_sample=True, seed=seed, max_new_tokens=2)
