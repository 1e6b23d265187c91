"""Perplexity against a computation of a few lines on transformers' logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.errors import RequestError
from dbrx_q.eval.perplexity import perplexity, read_text

DATA = Path(__file__).parent.parent / "data"
NANO = DATA / "dbrx-nano"


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return DbrxTokenizer.from_pretrained(NANO).encode(read_text(DATA / "war-of-the-worlds.txt")[:12000])


@pytest.fixture(scope="module")
def oracle() -> transformers.DbrxForCausalLM:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()


def window_losses(oracle: transformers.DbrxForCausalLM, window: list[int]) -> torch.Tensor:
    """Negative log-likelihoods of all tokens of a window but the first."""
    with torch.no_grad():
        log_p = oracle(torch.tensor([window])).logits[0].double().log_softmax(-1)
    return -log_p[:-1].gather(1, torch.tensor(window[1:])[:, None])[:, 0]


def test_non_overlapping_windows_leave_out_the_rest(model: DbrxForCausalLM, ids: list[int], oracle: transformers.DbrxForCausalLM) -> None:
    context = 300
    assert len(ids) % context
    losses = torch.cat([window_losses(oracle, ids[i : i + context]) for i in range(0, len(ids) - context + 1, context)])
    seen: list[tuple[int, int]] = []
    result = perplexity(model, ids, context=context, on_window=lambda done, total: seen.append((done, total)))
    assert result.tokens == len(losses) == len(ids) // context * (context - 1)
    assert math.isclose(result.perplexity, float(losses.mean().exp()), rel_tol=1e-5)
    assert math.isclose(result.perplexity, math.exp(result.nll / result.tokens), rel_tol=1e-12)
    assert math.isclose(result.stderr, result.perplexity * float(losses.std()) / len(losses) ** 0.5, rel_tol=1e-4)
    assert (result.context, result.stride, result.protocol) == (context, context, "non-overlapping")
    assert seen[-1] == (len(ids) // context, len(ids) // context)


@pytest.mark.parametrize(("context", "stride"), [(200, 50), (256, 255), (64, 63)])
def test_strided_windows_predict_every_token_once(
    model: DbrxForCausalLM, ids: list[int], oracle: transformers.DbrxForCausalLM, context: int, stride: int
) -> None:
    ids = ids[:1111]
    total, predicted = 0.0, 1
    for first in range(0, len(ids), stride):
        end = min(first + context, len(ids))
        total += float(window_losses(oracle, ids[first:end])[predicted - end :].sum())
        predicted = end
        if end == len(ids):
            break
    result = perplexity(model, ids, context=context, stride=stride)
    assert result.tokens == len(ids) - 1
    assert math.isclose(result.nll, total, rel_tol=1e-5)
    assert result.protocol == "strided"


def test_same_input_same_digits(model: DbrxForCausalLM, ids: list[int]) -> None:
    assert perplexity(model, ids, context=200) == perplexity(model, ids, context=200)


def test_quantized_perplexity_is_close_and_worse(model: DbrxForCausalLM, ids: list[int], quantized_nano: Path) -> None:
    plain = perplexity(model, ids, context=256).perplexity
    quantized = perplexity(DbrxForCausalLM.from_pretrained(quantized_nano, dtype="float32"), ids, context=256).perplexity
    assert quantized != plain
    assert abs(math.log(quantized / plain)) < 0.05


def test_bad_windows_and_texts_are_refused(model: DbrxForCausalLM, ids: list[int], tmp_path: Path) -> None:
    for context in (1, 2049):
        with pytest.raises(RequestError, match=f"context must be from 2 to the model's 2048 tokens; found {context}"):
            perplexity(model, ids, context=context)
    for stride in (0, 201):
        with pytest.raises(RequestError, match=f"stride must be from 1 to the context of 200 tokens; found {stride}"):
            perplexity(model, ids, context=200, stride=stride)
    with pytest.raises(RequestError, match="one window of 200 tokens; it has 150"):
        perplexity(model, ids[:150], context=200)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match=r"latin1\.txt: a text must be UTF-8; byte 3"):
        read_text(tmp_path / "latin1.txt")
