"""Perplexity against a computation of a few lines on transformers' logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.errors import RequestError
from dbrx_q.eval import observe
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.windows import Protocol

DATA = Path(__file__).parent.parent / "data"
NANO = DATA / "dbrx-nano"


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return DbrxTokenizer.from_pretrained(NANO).encode((DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")[:12000])


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


def test_non_overlapping_windows_omit_the_remainder(model: DbrxForCausalLM, ids: list[int], oracle: transformers.DbrxForCausalLM) -> None:
    context = 300
    assert len(ids) % context
    losses = torch.cat([window_losses(oracle, ids[i : i + context]) for i in range(0, len(ids) - context + 1, context)])
    seen: list[tuple[int, int]] = []
    result = perplexity(model, ids, Protocol.of(context), on_window=lambda done, total: seen.append((done, total)))
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
    result = perplexity(model, ids, Protocol.of(context, stride=stride))
    assert result.tokens == len(ids) - 1
    assert math.isclose(result.nll, total, rel_tol=1e-5)
    assert result.protocol == "strided"


def test_figures_are_reproducible(model: DbrxForCausalLM, ids: list[int]) -> None:
    assert perplexity(model, ids, Protocol.of(200)) == perplexity(model, ids, Protocol.of(200))


def test_quantized_perplexity_is_close_and_worse(model: DbrxForCausalLM, ids: list[int], quantized_nano: Path) -> None:
    plain = perplexity(model, ids, Protocol.of(256)).perplexity
    quantized = perplexity(DbrxForCausalLM.from_pretrained(quantized_nano, dtype="float32"), ids, Protocol.of(256)).perplexity
    assert quantized != plain
    assert abs(math.log(quantized / plain)) < 0.05


def test_half_windows_predict_their_second_half(model: DbrxForCausalLM, ids: list[int], oracle: transformers.DbrxForCausalLM) -> None:
    context = 200
    losses = torch.cat([window_losses(oracle, ids[i : i + context])[context // 2 :] for i in range(0, len(ids) - context + 1, context)])
    result = perplexity(model, ids, Protocol.of(context, half_window=True))
    assert result.tokens == len(losses) == len(ids) // context * (context // 2 - 1)
    assert math.isclose(result.perplexity, float(losses.mean().exp()), rel_tol=1e-5)
    assert result.protocol == "half-window"


def test_a_resumed_run_gives_the_same_figures(
    model: DbrxForCausalLM, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "STEP_TOKENS", 1024)  # two windows
    protocol = Protocol.of(512)
    expected = perplexity(model, ids, protocol)
    state = RunState({"run": 1}, tmp_path)

    def interrupt_at(windows: int) -> Callable[[int, int], None]:
        interrupted: list[int] = []

        def on_window(done: int, total: int) -> None:
            if done == windows and not interrupted:
                interrupted.append(done)
                raise KeyboardInterrupt

        return on_window

    with pytest.raises(KeyboardInterrupt):  # nothing to show yet
        perplexity(model, ids, protocol, state=state, on_window=interrupt_at(0))
    assert state.load() is None
    partial = perplexity(model, ids, protocol, state=state, on_window=interrupt_at(4))
    assert (partial.complete, partial.tokens, partial.total_tokens) == (False, 4 * 511, expected.tokens)
    assert state.load() is not None
    runs: list[int] = []
    assert perplexity(model, ids, protocol, state=state, on_window=lambda done, total: runs.append(done)) == expected
    assert runs[0] == 4
    assert state.load() is None


def test_a_damaged_state_is_ignored(tmp_path: Path) -> None:
    state = RunState({"run": 1}, tmp_path)
    assert RunState({"run": 2}, tmp_path).path != state.path
    state.path.write_bytes(b"PK")
    assert state.load() is None


def test_a_window_longer_than_a_step_runs_in_pieces(model: DbrxForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = perplexity(model, ids, Protocol.of(1500, stride=700))
    monkeypatch.setattr(observe, "STEP_TOKENS", 400)
    pieces = perplexity(model, ids, Protocol.of(1500, stride=700))
    assert pieces.tokens == expected.tokens == len(ids) - 1
    assert math.isclose(pieces.nll, expected.nll, rel_tol=1e-6)


def test_ids_of_another_tokenizer_are_refused(model: DbrxForCausalLM, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="below the model's vocabulary of 4096; found 5000"):
        perplexity(model, [*ids[:300], 5000], Protocol.of(200))
