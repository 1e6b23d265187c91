"""Generation: greedy decoding follows the logits, a batch equals its prompts one by one, and text ends where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, DbrxTokenizer, KVCache, SamplingParams, generate, generate_text, stream_text
from dbrx_q.errors import RequestError
from dbrx_q.generation.decoding import decoder_for
from dbrx_q.generation.sampling import sample

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
PROMPTS = ["The old man looked at", "It", "In the year 1898, when the whole of the county had been asked for its view, the", "She said: “"]


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> DbrxTokenizer:
    return DbrxTokenizer.from_pretrained(NANO)


def ids_of(tokenizer: DbrxTokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def test_greedy_equals_transformers(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    oracle = transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()
    ids = tokenizer.encode(PROMPTS[0])
    with torch.no_grad():
        expected = oracle.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=25, do_sample=False)
    [result] = generate(model, [ids], max_new_tokens=25)
    assert result.token_ids == expected[0, len(ids) :].tolist()
    assert (result.prompt_tokens, result.finish_reason, result.decode_steps) == (len(ids), "length", 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int4"])
def test_a_batch_equals_its_prompts_one_by_one(tokenizer: DbrxTokenizer, quantized: bool, dtype: str, quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano if quantized else NANO, dtype=dtype)
    prompts = [*ids_of(tokenizer), *(tokenizer.encode(f"{word} of the") for word in ("The sound", "Some", "A house"))]
    ends = [4092, generate(model, prompts[:1], max_new_tokens=8)[0].token_ids[-1]]  # the first sequence ends early
    together = generate(model, prompts, max_new_tokens=30, tokenizer=tokenizer, eos_token_ids=ends)
    alone = [generate(model, [prompt], max_new_tokens=30, tokenizer=tokenizer, eos_token_ids=ends)[0] for prompt in prompts]
    assert [(r.token_ids, r.text, r.finish_reason) for r in together] == [(r.token_ids, r.text, r.finish_reason) for r in alone]
    assert together[0].finish_reason == "eos"
    assert len(together[0].token_ids) < 30


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_quantized_cache_decodes_the_tokens_that_its_prefill_predicts(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, kv_format: str
) -> None:
    """Greedy tokens from a cache that was filled step by step are those of a prefill of the whole sequence."""
    prompts = ids_of(tokenizer)[:2]
    results = generate(model, prompts, max_new_tokens=10, kv_format=kv_format)
    for prompt, result in zip(prompts, results, strict=True):
        cache = KVCache(model.config, 1, len(prompt) + 10, dtype=model.dtype, format=kv_format)
        logits = model(torch.tensor([prompt + result.token_ids]), past_key_values=cache).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == result.token_ids
    plain = generate(model, prompts, max_new_tokens=10)
    assert sum(a == b for r, s in zip(results, plain, strict=True) for a, b in zip(r.token_ids, s.token_ids, strict=False)) >= 10


def test_rows_of_the_head_without_a_token_are_never_chosen(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    class WithoutOneToken(DbrxTokenizer):
        def has_token(self, token_id: int) -> bool:
            return token_id != likeliest and super().has_token(token_id)

    without_one_token = WithoutOneToken.from_pretrained(NANO)
    likeliest = generate(model, [tokenizer.encode(PROMPTS[0])], max_new_tokens=1)[0].token_ids[0]
    [result] = generate(model, [tokenizer.encode(PROMPTS[0])], max_new_tokens=20, tokenizer=without_one_token)
    assert likeliest not in result.token_ids


def test_generating_draws_nothing_from_torchs_global_generator(model: DbrxForCausalLM) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generate(model, [[5, 6]], max_new_tokens=2)
    assert torch.equal(torch.rand(1), expected)


def test_a_long_prompt_is_prefilled_in_chunks_with_the_same_result(model: DbrxForCausalLM) -> None:
    prompt = torch.randint(0, 4092, (1300,), generator=torch.Generator().manual_seed(3)).tolist()
    [result] = generate(model, [prompt], max_new_tokens=1, eos_token_ids=[])
    assert result.token_ids == [int(model(torch.tensor([prompt])).logits[0, -1].argmax())]


@pytest.mark.parametrize("kv_format", ["plain", "int8"])
def test_a_shared_prefix_is_computed_once(model: DbrxForCausalLM, kv_format: str) -> None:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 4000, (1600,), generator=generator).tolist()
    # They share with the first prompt: 1,300 tokens, of which two whole steps of 512 can be copied; all tokens; less than a step; nothing.
    prompts = [words, words[:1300] + [5] * 40, words[:1024], words[:300], [7, *words[:600]], words]
    alone = [generate(model, [prompt], max_new_tokens=5, eos_token_ids=[], kv_format=kv_format)[0] for prompt in prompts]
    together = generate(model, prompts, max_new_tokens=5, eos_token_ids=[], kv_format=kv_format)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.prefilled_tokens for result in alone] == [len(prompt) for prompt in prompts]
    assert [result.prefilled_tokens for result in together] == [1600, 1340 - 1024, 1024 - 512, 300, 601, 1600 - 1536]
    with decoder_for(model, [2000] * len(prompts), kv_format) as decoder:
        shared = [decoder.prefill(i, prompt) for i, prompt in enumerate(prompts)]
    for prompt, logits in zip(prompts, shared, strict=True):
        with decoder_for(model, [2000], kv_format) as decoder:
            assert torch.equal(decoder.prefill(0, prompt), logits)


def test_all_eos_ids_of_generation_config_end_a_sequence(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    assert model.eos_token_ids == (4092, 4094)
    prompt = tokenizer.encode(PROMPTS[0])
    third = generate(model, [prompt], max_new_tokens=3)[0].token_ids[2]
    [result] = generate(model, [prompt], max_new_tokens=30, eos_token_ids=[4094, third])
    assert result.finish_reason == "eos"
    assert len(result.token_ids) == 2


def test_stop_strings_cut_the_text_and_are_never_shown(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    prompt = tokenizer.encode(PROMPTS[0])
    full = generate(model, [prompt], max_new_tokens=30, tokenizer=tokenizer)[0].text
    stop = full[12:17]
    shown: list[str] = []
    [result] = generate(
        model, [prompt], max_new_tokens=30, tokenizer=tokenizer, stop=["never there", stop], on_text=lambda _, text: shown.append(text)
    )
    assert result.finish_reason == "stop"
    assert result.text == full[: full.index(stop)]
    assert "".join(shown) == result.text
    # The beginning of a stop string that is never completed is text.
    [result] = generate(model, [prompt], max_new_tokens=30, tokenizer=tokenizer, stop=[full[-2:] + "\0"])
    assert result.text == full


def test_streamed_pieces_make_up_the_text(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    pieces = list(stream_text(model, tokenizer, PROMPTS[2], max_new_tokens=20))
    assert len(pieces) > 5
    assert "".join(pieces) == generate_text(model, tokenizer, [PROMPTS[2]], max_new_tokens=20)[0]
    first = next(stream_text(model, tokenizer, PROMPTS[2], max_new_tokens=20))
    assert first == pieces[0]


def test_generation_ends_at_the_end_of_the_context(model: DbrxForCausalLM) -> None:
    prompt = [5] * 2040
    [result] = generate(model, [prompt], max_new_tokens=50, eos_token_ids=[])
    assert result.finish_reason == "context"
    assert len(prompt) + len(result.token_ids) == 2048


def test_sampling_is_repeatable_and_the_seeds_of_a_batch_count_up(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    prompts = ids_of(tokenizer)
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
    first = [r.token_ids for r in generate(model, prompts, max_new_tokens=15, sampling=params, eos_token_ids=[])]
    assert first == [r.token_ids for r in generate(model, prompts, max_new_tokens=15, sampling=params, eos_token_ids=[])]
    second = SamplingParams(temperature=0.9, top_p=0.95, seed=8)
    [alone] = generate(model, [prompts[1]], max_new_tokens=15, sampling=second, eos_token_ids=[])
    assert alone.token_ids == first[1]
    other = SamplingParams(temperature=0.9, top_p=0.95, seed=99)
    assert first != [r.token_ids for r in generate(model, prompts, max_new_tokens=15, sampling=other, eos_token_ids=[])]


def draws(params: SamplingParams, probabilities: list[float], n: int = 4000) -> list[float]:
    """The share of `n` draws that chose each token."""
    logits, generator = torch.tensor(probabilities).log(), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(logits, params, [], generator) for _ in range(n)]), minlength=len(probabilities))
    return (counts / n).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (SamplingParams(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
        (SamplingParams(temperature=1.0, min_p=0.25), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (SamplingParams(temperature=1e-40), [1, 0, 0, 0]),
        (SamplingParams(), [1, 0, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "top_p exactly", "min_p", "tiny temperature", "greedy"],
)
def test_sample_draws_from_the_filtered_distribution(params: SamplingParams, expected: list[float]) -> None:
    frequencies = draws(params, [0.5, 0.3, 0.15, 0.05])
    for frequency, probability in zip(frequencies, expected, strict=True):
        assert abs(frequency - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    generator = torch.Generator()
    assert sample(logits, SamplingParams(repetition_penalty=2.0), [0, 0], generator) == 1
    assert sample(torch.tensor([-1.0, -1.5]), SamplingParams(repetition_penalty=2.0), [0], generator) == 1
    assert sample(logits, SamplingParams(), [0], generator) == 0
    assert logits[0] == 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_sampling_values_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(arguments))} must be"):
        SamplingParams(**arguments)  # type: ignore[arg-type] # one case each


def test_bad_requests_are_refused(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        generate(model, [[1], []])
    with pytest.raises(RequestError, match="context of 2048 tokens; prompt 0 has 2048"):
        generate(model, [[1] * 2048])
    with pytest.raises(RequestError, match="0 to 4095; prompt 0 holds 5000"):
        generate(model, [[1, 5000]])
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1; found 0"):
        generate(model, [[1]], max_new_tokens=0)
    with pytest.raises(RequestError, match="need a tokenizer"):
        generate(model, [[1]], stop=["x"])
    with pytest.raises(RequestError, match="must not be empty"):
        generate(model, [[1]], stop=[""], tokenizer=tokenizer)
    assert generate(model, []) == []
