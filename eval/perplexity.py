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
from .resume import RunState, kept_requests, restored_requests
from .windows import Protocol

__all__ = ["PerplexityResult", "perplexity"]

_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp(nll / tokens). stderr: its standard error. nll: total, in nats. tokens: predicted. protocol: how windows lie.

    fallback_share: share of the requests for experts that a fallback copy answered.

    complete: False where the run was interrupted and the figures are of the first `tokens` of `total_tokens` predicted tokens.
    """

    perplexity: float
    stderr: float
    nll: float
    tokens: int
    total_tokens: int
    complete: bool
    protocol: str
    context: int
    stride: int
    fallback_share: float = 0.0


def perplexity(
    model: DbrxForCausalLM,
    ids: Sequence[int],
    protocol: Protocol,
    *,
    kv_format: str = "plain",
    state: RunState | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Perplexity of a tokenised text. Logits are in the model's arithmetic, what comes after them in float64.

    Ctrl-C ends it with the figures so far, once there are any.

    Args:
        model: a loaded model.
        ids: the text's token ids.
        protocol: how the text is cut into windows, and which of their tokens are predicted.
        kv_format: "plain" attends to keys and values as they are; "int8" and "int4" to what a cache of that format keeps of them.
        state: where figures so far are kept, and found again; None for nowhere.
        on_window: called with (windows done, windows in all).

    Raises:
        RequestError: a text shorter than one window, a context that the model does not have, or ids that it does not know.
    """
    protocol.check(len(ids), model.config)
    check_ids(ids, model.config.vocab_size)
    windows = protocol.windows(len(ids))
    text = torch.tensor(ids)
    total = sum(window.tokens for window in windows)
    # Filled in place: small arrays that stay would keep the allocator from giving back the large ones between them.
    losses = np.empty(total)
    done, tokens, served = _restored(state, losses)
    before = served - model.expert_store.stats()
    saved = time.monotonic()
    try:
        for first, batch in batches(windows, step_tokens([model]), [done]):
            if first < done:
                continue
            on_window(done, len(windows))
            at = tokens
            for seen in observe(model, text, batch, kv_format=kv_format):
                for place, logits in logit_chunks(model, seen):
                    found = negative_log_likelihood(logits, seen.targets[place])
                    losses[at : at + len(found)] = found.cpu().numpy()
                    at += len(found)
            done, tokens = done + len(batch), at
            if state is not None and time.monotonic() - saved > _SAVE_SECONDS:
                _keep(state, done, losses[:tokens], before + model.expert_store.stats())
                saved = time.monotonic()
    except KeyboardInterrupt:
        if not done:
            raise
        if state is not None:
            _keep(state, done, losses[:tokens], before + model.expert_store.stats())
    on_window(done, len(windows))
    values = losses[:tokens]
    mean, error = mean_and_stderr(values)
    likely = float(np.exp(mean))
    if done == len(windows) and state is not None:
        state.clear()
    return PerplexityResult(
        perplexity=likely,
        stderr=likely * error,  # of exp(mean), by the delta method
        nll=float(values.sum()),
        tokens=tokens,
        total_tokens=total,
        complete=done == len(windows),
        protocol=protocol.name,
        context=protocol.context,
        stride=protocol.stride,
        fallback_share=(before + model.expert_store.stats()).fallback_share,
    )


def _restored(state: RunState | None, losses: np.ndarray) -> tuple[int, int, ExpertStats]:
    """(windows, tokens, requests for experts) that are done of an interrupted run, whose figures go to the beginning of `losses`."""
    kept = None if state is None else state.load()
    if kept is None:
        return 0, 0, ExpertStats()
    tokens = len(kept["losses"])
    losses[:tokens] = kept["losses"]
    return int(kept["windows"]), tokens, restored_requests(kept)


def _keep(state: RunState, done: int, losses: np.ndarray, served: ExpertStats) -> None:
    state.save({"windows": np.array(done), "losses": losses} | kept_requests(served))
