"""The adapter for lm-evaluation-harness against the harness's own adapter for transformers, on transformers' model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dbrx_q import DbrxForCausalLM, DbrxTokenizer, KVCache
from dbrx_q.errors import RequestError, TokenizerError
from dbrx_q.eval.tasks import harness as harness_module
from dbrx_q.eval.tasks import shared_prefix
from dbrx_q.eval.tasks.harness import HarnessModel
from dbrx_q.eval.tasks.shared_prefix import Continuation, PrefixScorer
from dbrx_q.model.limits import Limits

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
BOOK = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")
HEADER = BOOK[3000:3400]


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> DbrxTokenizer:
    return DbrxTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """The harness's adapter on transformers' model, with the pattern of the tokenizer's file."""
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    plain = transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(NANO / "tokenizer.json"), **names)
    return HFLM(pretrained=plain, tokenizer=tokenizer, max_length=2048, batch_size=1)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments)]


def adapter(model: DbrxForCausalLM, tokenizer: DbrxTokenizer, **options: Any) -> HarnessModel:
    return HarnessModel(model, tokenizer, **options)


QUESTIONS = [f"{HEADER}\n\nQuestion: {question}\nAnswer:" for question in ("What fell", "Where did the cylinder fall", "Who")]
PAIRS = [
    *[(question, choice) for question in QUESTIONS for choice in (" the", " a", " I", " Mars")],
    *[
        (question, choice)
        for question in reversed(QUESTIONS)
        for choice in (" upon the common near Horsell", " the night of the first star")
    ],
    ("", "The cylinder"),
    ("", " and"),
    ("<|endoftext|>No one would have ", " believed"),
    ("It was", "\n"),
    ("It was", " a"),
    ("It was", " a"),
    (QUESTIONS[0], " the common"),
    (BOOK[:12000], " and the last of it"),
    (BOOK[:12000], " and"),
]


@pytest.fixture(scope="module")
def expected(oracle: Any) -> list[tuple[float, bool]]:
    results: list[tuple[float, bool]] = oracle.loglikelihood(requests("loglikelihood", PAIRS))
    return results


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_loglikelihoods_equal_those_of_the_harness(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, expected: list[tuple[float, bool]], batch_size: int
) -> None:
    assert len(tokenizer.encode(BOOK[:12000])) > model.config.max_seq_len  # is truncated
    results = adapter(model, tokenizer, batch_size=batch_size).loglikelihood(requests("loglikelihood", PAIRS))
    assert any(greedy for _, greedy in expected)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], rel=1e-4)


def test_smaller_steps_give_the_same_figures(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, expected: list[tuple[float, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "STEP_TOKENS", 37)
    monkeypatch.setattr(shared_prefix, "LOGIT_TOKENS", 2)
    results = adapter(model, tokenizer, batch_size=5).loglikelihood(requests("loglikelihood", PAIRS[:-2]))
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected[:-2]], rel=1e-4)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_quantized_cache_is_close(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, expected: list[tuple[float, bool]], kv_format: str
) -> None:
    results = adapter(model, tokenizer, batch_size=8, kv_format=kv_format).loglikelihood(requests("loglikelihood", PAIRS[:18]))
    differences = [abs(value - exact) for (value, _), (exact, _) in zip(results, expected, strict=False)]
    assert 0 < max(differences) < (0.1 if kv_format == "int8" else 1)


def test_a_shared_prefix_runs_once(model: DbrxForCausalLM) -> None:
    header, left, right = tuple(range(100, 150)), (200, 201, 202), (210, 211)
    choices = [(300,), (301,), (302, 303)]
    asked = [Continuation(header + question, choice) for choice in choices for question in (left, right)]
    scorer = PrefixScorer(model, batch_size=6)
    scorer.score(asked)
    # The header, both questions, and the first token of the two choices of two.
    assert scorer.counts.prefilled == 50 + 3 + 2 + 2
    assert scorer.counts.requested == 3 * (53 + 52) + 2
    scorer.score([Continuation((*header, last), (300 + last,)) for last in (220, 221)])
    assert scorer.counts.prefilled == 57 + 2  # the trunk of the previous call still holds the header
    unbatched = PrefixScorer(model, batch_size=1)
    unbatched.score(asked)
    # Without batches: the header once; each question once and its last token again for every other choice; the longer choice.
    assert unbatched.counts.prefilled == 50 + (3 + 1 + 1 + 1) + (2 + 1 + 1 + 1)


def test_rows_of_a_batch_share_the_memory_of_one_context(model: DbrxForCausalLM) -> None:
    scorer = PrefixScorer(model, batch_size=8)
    long = tuple(range(1000, 1900))
    asked = [Continuation((i, *long), (5, 6)) for i in range(3)]
    counts: list[tuple[int, int]] = []
    results = scorer.score(asked, on_scored=lambda *scored: counts.append(scored))
    assert counts == [(2, 3), (3, 3)]
    assert results == [pytest.approx(PrefixScorer(model).score([continuation])[0]) for continuation in asked]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_loglikelihoods_equal_those_of_the_harness(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, oracle: Any, batch_size: int
) -> None:
    texts = requests("loglikelihood_rolling", [(BOOK[:12000],), ("It was",), (BOOK[500:1500],), ("",)])
    results = adapter(model, tokenizer, batch_size=batch_size).loglikelihood_rolling(texts)
    assert results == pytest.approx(oracle.loglikelihood_rolling(texts), rel=1e-4)
    assert results[3] == 0


def test_generation_equals_that_of_the_harness(model: DbrxForCausalLM, tokenizer: DbrxTokenizer, oracle: Any) -> None:
    short, long = {"until": ["\n\n", " the"], "max_gen_toks": 12}, {"until": ["."], "max_gen_toks": 20, "do_sample": False}
    asked = requests(
        "generate_until",
        [(HEADER, short), ("It was", long), (BOOK[700:1200], short), ("No one would", long), (BOOK[:12000], {"max_gen_toks": 5})],
    )
    expected = oracle.generate_until(asked)
    assert len(set(expected)) == len(asked)
    for batch_size in (1, 3):
        assert adapter(model, tokenizer, batch_size=batch_size).generate_until(asked) == expected


def test_sampling_does_not_depend_on_the_batch(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 8}
    asked = requests("generate_until", [("It was", options)] * 5)
    drawn = adapter(model, tokenizer, batch_size=1).generate_until(asked)
    assert len(set(drawn)) > 1
    assert adapter(model, tokenizer, batch_size=3).generate_until(asked) == drawn
    assert adapter(model, tokenizer, batch_size=3, seed=7).generate_until(asked) != drawn
    greedy = adapter(model, tokenizer).generate_until(requests("generate_until", [("It was", {**options, "do_sample": False})]))
    assert greedy == adapter(model, tokenizer).generate_until(requests("generate_until", [("It was", {"max_gen_toks": 8})]))


def test_sampling_uses_the_fifty_likeliest_tokens_as_in_transformers(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    options = {"do_sample": True, "temperature": 8.0, "max_gen_toks": 8}

    def drawn(**more: object) -> list[str]:
        return adapter(model, tokenizer).generate_until(requests("generate_until", [("It was", {**options, **more})] * 2))

    assert drawn() == drawn(top_k=50) == drawn(top_k=None)
    assert drawn() != drawn(top_k=0)


def test_prompts_with_a_common_prefix_run_together(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    asked = requests(
        "generate_until", [(start + end, {"max_gen_toks": 2}) for end in ("a", "b") for start in (BOOK[:2500], BOOK[2500:5000])]
    )
    harness = adapter(model, tokenizer, batch_size=2)
    results = harness.generate_until(asked)
    assert harness.counts.prefilled <= harness.counts.requested - 2 * 512
    assert results == [adapter(model, tokenizer).generate_until([request])[0] for request in asked]


def test_truncated_contexts_are_counted(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    harness = adapter(model, tokenizer)
    harness.loglikelihood(requests("loglikelihood", [("It was", " a"), (BOOK[:12000], " and")]))
    harness.generate_until(requests("generate_until", [("It was", {"max_gen_toks": 1}), (BOOK[:12000], {"max_gen_toks": 1})]))
    assert harness.counts.truncated == 2
    harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(BOOK[:12000],)]))
    assert harness.counts.truncated == 2  # windows leave nothing out


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("known_batches", [1, 4, 7])
def test_answers_of_a_resumed_run_are_bit_identical(model: DbrxForCausalLM, batch_size: int, known_batches: int) -> None:
    header = tuple(range(100, 160))
    starts = [(*header[: 20 + 7 * i], 200 + i) for i in range(6)]
    asked = [Continuation(start, (300, 301)[: 1 + i % 2]) for i, start in enumerate(starts)]
    asked += [Continuation((*starts[3], 5, 6, 7), (300 + i,)) for i in range(4)]
    batches: list[dict[int, tuple[float, bool]]] = []
    first_run = PrefixScorer(model, batch_size=batch_size)
    exact = first_run.score(asked, on_answers=lambda answers: batches.append(dict(answers)))
    known = {i: answer for batch in batches[: known_batches if batch_size == 1 else known_batches // 3 + 1] for i, answer in batch.items()}
    resumed = PrefixScorer(model, batch_size=batch_size)
    assert resumed.score(asked, known=known) == exact
    assert resumed.counts == first_run.counts


def test_an_empty_prompt_begins_with_the_begin_token(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    options = {"max_gen_toks": 6}
    empty, named = adapter(model, tokenizer).generate_until(requests("generate_until", [("", options), ("<|endoftext|>", options)]))
    assert empty == named


def test_chat_templates_end_where_the_answer_begins(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well "}]
    harness = adapter(model, tokenizer, name="org/dbrx")
    assert harness.apply_chat_template(turns[:1]) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert harness.apply_chat_template(turns, add_generation_prompt=False).endswith("<|im_start|>assistant\nWell ")
    assert harness.tokenizer_name == "org__dbrx"
    assert harness.chat_template(True) == tokenizer.chat_template
    assert harness.tok_encode(harness.apply_chat_template(turns[:1])) == tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 2048}, "from 1 to 2047.*found 2048"),
        ({"max_tokens": 0}, "found 0"),
        ({"num_beams": 4}, "found 'num_beams'"),
        ({"penalty_alpha": 0.6}, "found 'penalty_alpha'"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": "warm"}, "must be numbers and strings.*'warm'"),
        ({"do_sample": True, "top_k": "five"}, "must be numbers and strings.*five"),
    ],
)
def test_unsupported_generation_options_are_refused(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness_module, "generate", None)  # the last request is checked before the first is answered
    with pytest.raises(RequestError, match=message):
        adapter(model, tokenizer).generate_until(requests("generate_until", [("It was", {"do_sample": False}), ("It was", options)]))


def test_requests_that_cannot_be_served_are_refused(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    harness = adapter(model, tokenizer)
    with pytest.raises(RequestError, match="must have text; found an empty one after 'It was'"):
        harness.loglikelihood(requests("loglikelihood", [("It was", "")]))
    with pytest.raises(RequestError, match=r"1 to 2048 tokens, the model's context; found \d+ in"):
        harness.loglikelihood(requests("loglikelihood", [("It was", BOOK[:12000])]))
    with pytest.raises(RequestError, match="at least 1 request; found 0"):
        adapter(model, tokenizer, batch_size=0)
    with pytest.raises(RequestError, match="found 4096"):
        PrefixScorer(model).score([Continuation((1,), (4096,))])
    with pytest.raises(RequestError, match="context of 2048; found 2049"):
        PrefixScorer(model).score([Continuation((1,) * 2048, (1, 2))])
    with pytest.raises(RequestError, match="found an empty one"):
        PrefixScorer(model).score([Continuation((), (1,))])
    roles = DbrxTokenizer.from_pretrained(NANO)
    roles.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(TokenizerError, match="continues its last message"):
        adapter(model, roles).apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=False)


def test_caches_together_stay_within_the_budget(model: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches of prefixes, contexts and continuations together fit into the memory that was planned for keys and values."""
    token_bytes = KVCache(model.config, 1, 1, dtype=model.dtype, device="meta").nbytes
    monkeypatch.setattr(model.transformer, "limits", Limits(kv_bytes=3 * 60 * token_bytes))
    held: list[weakref.ref[KVCache]] = []
    most, real = 0, KVCache.forked

    def note(cache: KVCache) -> KVCache:
        nonlocal most
        held.append(weakref.ref(cache))
        most = max(most, sum(live.nbytes for live in (ref() for ref in held) if live is not None))
        return cache

    monkeypatch.setattr(KVCache, "forked", lambda self, *arguments: note(real(self, *arguments)))
    scorer = PrefixScorer(model, batch_size=8)
    note(scorer._trunk)
    shared = tuple(range(5, 25))
    asked = [Continuation((*shared, i), tuple(range(30, 30 + n))) for i, n in enumerate((2, 5, 9, 20, 1, 30))]
    results = scorer.score(asked)
    assert 0 < most <= 3 * 60 * token_bytes
    with pytest.raises(RequestError, match="must fit the 60 tokens that the KV cache has memory for; found 61"):
        scorer.score([Continuation((1,) * 60, (1, 2))])
    monkeypatch.setattr(model.transformer, "limits", Limits())
    for (value, _), (exact, _) in zip(results, PrefixScorer(model, batch_size=8).score(asked), strict=True):
        assert value == pytest.approx(exact, abs=1e-3)


def test_a_failed_call_leaves_no_wrong_prefix(model: DbrxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = PrefixScorer(model, batch_size=2)
    asked = [Continuation((*range(100, 130), last), (5, 6)) for last in (1, 2)]
    with monkeypatch.context() as broken:
        broken.setattr(scorer, "_score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scorer.score([Continuation((*range(100, 120), 9), (5, 6)), Continuation((*range(100, 120), 9), (7,))])
    (value, _), _ = scorer.score(asked)
    assert math.isclose(value, PrefixScorer(model).score(asked[:1])[0][0], rel_tol=1e-5)
