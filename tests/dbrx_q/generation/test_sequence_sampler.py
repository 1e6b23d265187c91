"""Sequences that a model writes by itself follow its probabilities, begin as they should, and repeat with their seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_q.errors import RequestError, TokenizerError
from dbrx_q.generation.sequence_sampler import SequenceStart, TextTokens, draw_tokens, sample_sequences

from .test_sampling_distribution import DRAWS, chi_square

V, BOS, END, SPECIAL, PADDING = 61, 3, 5, (7, 8), (59, 60)
BOS_ALONE, SEEDS = SequenceStart(True), SequenceStart(False, 2)


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    """A model of random weights with a head that makes probabilities uneven."""
    torch.manual_seed(0)
    model = DbrxForCausalLM(
        DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=V,
            attn_config={"kv_n_heads": 2, "clip_qkv": None},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
    )
    for name, parameter in model.named_parameters():
        if not ("norm" in name and parameter.ndim == 1):
            torch.nn.init.normal_(parameter, std=1.0 if "wte" in name else 0.3)
    return model


def text_tokens(bos: int | None = END) -> TextTokens:
    text = torch.ones(V, dtype=torch.bool)
    text[[i for i in (bos, END, *SPECIAL, *PADDING) if i is not None]] = False
    return TextTokens(text, bos, END)


def probabilities_after(model: DbrxForCausalLM, tokens: TextTokens, document: list[int]) -> torch.Tensor:
    """float64 [tokens, V], of what follows each token of a document, computed at once without a cache."""
    logits = model(torch.tensor([document]), use_cache=False).logits[0].double()
    return logits.masked_fill(~tokens.drawable, -torch.inf).softmax(-1)


def documents_of(row: list[int], bos: int | None, restart_every: int | None) -> list[list[int]]:
    """The documents of a sequence; an end that is bos as well stands in the document that it begins."""
    documents: list[list[int]] = [[]]
    for token in row:
        ended = documents[-1] and (documents[-1][-1] == END and len(documents[-1]) > 1)
        if ended or len(documents[-1]) == restart_every or (documents[-1] and bos == END and token == END):
            documents.append([])
        documents[-1].append(token)
    return documents


def test_the_token_after_bos_has_the_probabilities_of_the_model(model: DbrxForCausalLM) -> None:
    tokens = text_tokens()
    ids = sample_sequences(model, tokens, count=DRAWS, length=2, seed=1, batch=1000, starts=[BOS_ALONE])
    assert ids.dtype == torch.int64
    assert set(ids[:, 0].tolist()) == {END}
    probabilities = probabilities_after(model, tokens, [END])[0]
    statistic, bound = chi_square(torch.bincount(ids[:, 1], minlength=V).double(), probabilities)
    assert statistic <= bound
    statistic, bound = chi_square(torch.bincount(ids[:, 1], minlength=V).double(), (probabilities**0.8) / (probabilities**0.8).sum())
    assert statistic > bound  # so many draws tell a temperature of 1.25 from 1


@pytest.mark.parametrize(("bos", "restart_every"), [(END, None), (BOS, None), (None, None), (END, 9)])
def test_every_token_has_the_probabilities_of_the_model(model: DbrxForCausalLM, bos: int | None, restart_every: int | None) -> None:
    """The surprise of each drawn token less its expectation, over the root of the sum of its variances, is a standard normal number."""
    tokens = text_tokens(bos)
    ids = sample_sequences(model, tokens, count=90, length=40, seed=2, batch=64, starts=[BOS_ALONE, SEEDS], restart_every=restart_every)
    excess = variance = 0.0
    ends = drawn = 0
    for number, row in enumerate(ids.tolist()):
        start = [BOS_ALONE, SEEDS][number % 2]
        given = 1 if start.bos else start.seed_tokens
        for document in documents_of(row, bos if start.bos else None, restart_every):
            ends += document[-1] == END
            if start.bos and bos is not None:
                assert document[0] == bos
            probabilities = probabilities_after(model, tokens, document)
            for probability, token in zip(probabilities[given - 1 :], document[given:], strict=False):
                surprise = -probability.clamp(min=1e-300).log()
                mean = float((probability * surprise).sum())
                excess += float(surprise[token]) - mean
                variance += float((probability * (surprise - mean) ** 2).sum())
                drawn += 1
    assert abs(excess) < 5 * variance**0.5
    assert ends > 20  # so documents end and others follow in these sequences
    assert drawn > 2000


def test_no_special_token_and_no_id_without_a_token_is_drawn(model: DbrxForCausalLM) -> None:
    ids = sample_sequences(model, text_tokens(BOS), count=200, length=30, seed=3, starts=[SEEDS, SequenceStart(False, 16)])
    assert set(range(V)) - set(ids.unique().tolist()) == {BOS, *SPECIAL, *PADDING}


def test_a_number_at_the_end_of_the_interval_draws_a_token_that_has_a_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -200.0, 3.0]])
    drawable = torch.tensor([False, True, True, True, False])
    for number, token in ((0.0, 1), (1 - 2**-53, 2), (1 / (1 + torch.e) - 1e-6, 1), (1 / (1 + torch.e) + 1e-6, 2)):
        assert draw_tokens(logits, drawable, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def test_the_seed_repeats_the_sequences_on_any_number_of_threads(nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(nano)
    tokens = TextTokens.of(DbrxTokenizer.from_pretrained(nano), model.config.vocab_size)
    arguments = {"count": 6, "length": 4, "batch": 4}
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(sample_sequences(model, tokens, seed=0, **arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], sample_sequences(model, tokens, seed=1, **arguments))
    batches: list[torch.Tensor] = []
    steps: list[int] = []
    rest = sample_sequences(model, tokens, seed=0, first=4, on_batch=batches.append, on_step=steps.append, **arguments)
    assert torch.equal(rest, results[0][4:])  # what is sampled already does not change the others
    assert torch.equal(batches[0], rest)
    assert (steps[0], steps[-1]) == (4 * 4 + 2, 6 * 4)


def test_tokens_of_text_are_those_of_the_tokenizer(nano: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano / name, tmp_path / name)
    tokenizer = DbrxTokenizer.from_pretrained(tmp_path)
    tokens = TextTokens.of(tokenizer, 4200)  # 104 ids that pad the vocabulary
    assert tokens.text.nonzero()[:, 0].tolist() == list(range(4092))
    assert tokens.drawable.nonzero()[:, 0].tolist() == list(range(4093))
    assert (tokens.bos, tokens.end) == (4092, 4092)
    tokens = TextTokens.of(tokenizer, 4000)
    assert (tokens.bos, tokens.end, int(tokens.text.sum())) == (None, None, 4000)
    tokenizer.vocabulary._bytes.clear()
    with pytest.raises(TokenizerError, match="found none"):
        TextTokens.of(tokenizer, 4200)


def test_logits_that_are_not_finite_are_refused_with_the_layer(model: DbrxForCausalLM) -> None:
    weight = model.transformer.layers()[1].norm_attn_norm.norm_2.weight
    before = weight.clone()
    try:
        weight.data.fill_(float("inf"))
        with pytest.raises(RequestError, match=r"logits must be finite.*layer 1"):
            sample_sequences(model, text_tokens(), count=3, length=8, seed=0)
    finally:
        weight.data.copy_(before)


def test_bad_requests_are_refused(model: DbrxForCausalLM) -> None:
    good = {"count": 2, "length": 8, "seed": 0}
    for change, message in (
        ({"count": 0}, "found 0, 8, 128"),
        ({"length": 1}, "found 2, 1, 128"),
        ({"batch": 0}, "found 2, 8, 0"),
        ({"length": 65}, "context of 64 tokens; found 65"),
        ({"seed": -1}, "found -1"),
        ({"starts": []}, "found none"),
        ({"restart_every": 1}, "found 1"),
    ):
        with pytest.raises(RequestError, match=message):
            sample_sequences(model, text_tokens(), **(good | change))
    with pytest.raises(RequestError, match="found 0 without bos"):
        SequenceStart(False)
