"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dbrx_q.experts.stats import ExpertStats
from dbrx_q.model.modeling import DbrxForCausalLM

from .divergence import mean_and_stderr, negative_log_likelihood
from .observe import batches, check_ids, logit_chunks, observe, step_tokens
from .resume import RunState, restored_requests, saved_requests
from .windows import Protocol

__all__ = ["PerplexityResult", "perplexity"]

_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of one text, and how the text was cut; the JSON object of `dbrx-q perplexity --json` has these fields."""

    perplexity: float
    """exp(nll / tokens)."""
    stderr: float
    """Standard error of `perplexity`, as if tokens were independent."""
    nll: float
    """Negative log-likelihood of all predicted tokens together, in nats."""
    tokens: int
    """Tokens predicted so far."""
    total_tokens: int
    """Tokens that a complete run predicts."""
    complete: bool
    """False if the run was interrupted; the figures are then those of the first `tokens` predicted tokens."""
    protocol: str
    """One of `windows.PROTOCOLS`."""
    context: int
    """Tokens of a window."""
    stride: int
    """Tokens between the starts of two windows."""
    fallback_share: float = 0.0
    """Share of the requests for experts that a fallback copy answered."""


def perplexity(
    model: DbrxForCausalLM,
    ids: Sequence[int],
    protocol: Protocol,
    *,
    kv_format: str = "plain",
    state: RunState | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Measure the perplexity of a tokenised text. Logits have the model's dtype; everything computed from them is float64.

    Ctrl-C ends the run with the figures of the windows done so far, if there are any.

    Args:
        model: a loaded model.
        ids: the text's token ids.
        protocol: how the text is cut into windows, and which of their tokens are predicted.
        kv_format: "plain" attends to unquantized keys and values; "int8" and "int4" to keys and values quantized to that format.
        state: where partial results are saved, and read from when the run is resumed; None to save none.
        on_window: called with (windows done, windows in all).

    Raises:
        RequestError: the text is shorter than one window, the context longer than the model's, or an id outside its vocabulary.
    """
    protocol.check(len(ids), model.config)
    check_ids(ids, model.config.vocab_size)
    windows = protocol.windows(len(ids))
    text = torch.tensor(ids)
    total = sum(window.tokens for window in windows)
    # One array for the whole run: small arrays allocated between large ones would keep the allocator from returning those to the system.
    losses = np.empty(total)
    done, tokens, earlier_requests = _restored(state, losses)
    earlier_requests = earlier_requests - model.expert_store.stats()
    last_save = time.monotonic()
    try:
        for first, batch in batches(windows, step_tokens([model]), [done]):
            if first < done:
                continue
            on_window(done, len(windows))
            end = tokens
            for step in observe(model, text, batch, kv_format=kv_format):
                for chunk, logits in logit_chunks(model, step):
                    nll = negative_log_likelihood(logits, step.targets[chunk])
                    losses[end : end + len(nll)] = nll.cpu().numpy()
                    end += len(nll)
            done, tokens = done + len(batch), end
            if state is not None and time.monotonic() - last_save > _SAVE_SECONDS:
                _save(state, done, losses[:tokens], earlier_requests + model.expert_store.stats())
                last_save = time.monotonic()
    except KeyboardInterrupt:
        if not done:
            raise
        if state is not None:
            _save(state, done, losses[:tokens], earlier_requests + model.expert_store.stats())
    on_window(done, len(windows))
    values = losses[:tokens]
    mean, error = mean_and_stderr(values)
    exp_mean = float(np.exp(mean))
    if done == len(windows) and state is not None:
        state.clear()
    return PerplexityResult(
        perplexity=exp_mean,
        stderr=exp_mean * error,  # of exp(mean), by the delta method
        nll=float(values.sum()),
        tokens=tokens,
        total_tokens=total,
        complete=done == len(windows),
        protocol=protocol.name,
        context=protocol.context,
        stride=protocol.stride,
        fallback_share=(earlier_requests + model.expert_store.stats()).fallback_share,
    )


def _restored(state: RunState | None, losses: np.ndarray) -> tuple[int, int, ExpertStats]:
    """(windows, tokens, requests for experts) of an interrupted run; its losses are copied to the beginning of `losses`."""
    saved = None if state is None else state.load()
    if saved is None:
        return 0, 0, ExpertStats()
    tokens = len(saved["losses"])
    losses[:tokens] = saved["losses"]
    return int(saved["windows"]), tokens, restored_requests(saved)


def _save(state: RunState, done: int, losses: np.ndarray, requests: ExpertStats) -> None:
    state.save({"windows": np.array(done), "losses": losses} | saved_requests(requests))
