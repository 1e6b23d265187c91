"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.kv_cache import KVCache
from dbrx_q.model import DbrxForCausalLM

__all__ = ["PerplexityResult", "check_windows", "perplexity", "read_text"]

_BATCH_TOKENS = 4096  # windows that run together: enough to keep matrix units busy
_LOGIT_TOKENS = 256  # logits that are held at once; at 100,352 float32 each, 103 MB


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp(nll / tokens). stderr: its standard error. nll: total, in nats. tokens: predicted. protocol: how windows lie."""

    perplexity: float
    stderr: float
    nll: float
    tokens: int
    context: int
    stride: int
    protocol: str


@dataclass(frozen=True)
class _Window:
    """Tokens first .. end-1 are seen; those from `scored` on are predicted."""

    first: int
    end: int
    scored: int


def perplexity(
    model: DbrxForCausalLM,
    ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    kv_format: str = "plain",
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Perplexity of a tokenised text.

    Protocols: "non-overlapping" windows of `context` tokens, in which every token but the first is predicted and a rest that fills no
    window is left out (Frantar et al. 2022, GPTQ); "strided" windows that begin every `stride` tokens, in which only tokens not yet
    predicted count, up to the last token of the text.

    Args:
        model: a loaded model.
        ids: the text's token ids.
        context: tokens of a window, from 2 to the model's context.
        stride: tokens between the starts of windows, 1 to `context`; None or `context` is "non-overlapping".
        kv_format: "plain" attends to keys and values as they are; "int8" and "int4" to what a cache of that format keeps of them.
        on_window: called with (windows done, windows in all).

    Raises:
        RequestError: a text shorter than one window, or a context or stride out of range.
    """
    check_windows(len(ids), context, stride, model.config)
    step = context if stride is None else stride
    windows = list(_windows(len(ids), context, step))
    text = torch.tensor(ids)
    losses = []
    together = max(1, _BATCH_TOKENS // context)
    for first in range(0, len(windows), together):
        batch = windows[first : first + together]
        losses.append(_losses(model, text, batch, kv_format))
        on_window(first + len(batch), len(windows))
    values = torch.cat(losses).double()
    mean = values.mean()
    # The standard error of exp(mean) is exp(mean) times that of the mean (delta method).
    error = values.std(unbiased=True) / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(0.0)
    return PerplexityResult(
        perplexity=float(mean.exp()),
        stderr=float(mean.exp() * error),
        nll=float(values.sum()),
        tokens=len(values),
        context=context,
        stride=step,
        protocol="non-overlapping" if step == context else "strided",
    )


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        RequestError: the file is missing, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: line ends are tokens too
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: a text must be UTF-8; byte {error.start} is not. Convert the file") from None
    except OSError as error:
        raise RequestError(f"{path}: a text must be a readable file; {error.strerror}") from None
    if not text:
        raise RequestError(f"{path}: a text must not be empty")
    return text


def check_windows(tokens: int, context: int, stride: int | None, config: DbrxConfig, *, source: str = "the text") -> None:
    """Refuse a context or stride that cannot be measured with on a text of `tokens` tokens; `source` is what an error calls it.

    Raises:
        RequestError: with the rule and the value.
    """
    if not 2 <= context <= config.max_seq_len:
        raise RequestError(f"the context must be from 2 to the model's {config.max_seq_len} tokens; found {context}")
    if stride is not None and not 1 <= stride <= context:
        raise RequestError(f"the stride must be from 1 to the context of {context} tokens; found {stride}")
    if tokens < context:
        raise RequestError(f"{source} must fill one window of {context} tokens; it has {tokens}. Give a longer text or a smaller --context")


def _windows(tokens: int, context: int, stride: int) -> Iterator[_Window]:
    if stride == context:
        for first in range(0, tokens - context + 1, context):
            yield _Window(first, first + context, first + 1)
        return
    scored = 1
    for first in range(0, tokens, stride):
        end = min(first + context, tokens)
        yield _Window(first, end, scored)
        scored = end
        if end == tokens:
            return


def _losses(model: DbrxForCausalLM, text: torch.Tensor, windows: list[_Window], kv_format: str) -> torch.Tensor:
    """float32 negative log-likelihoods of the scored tokens, window by window."""
    width = max(window.end - window.first for window in windows)
    ids = torch.zeros(len(windows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        length = window.end - window.first
        ids[row, :length] = text[window.first : window.end]
        mask[row, :length] = 1
    cache = None
    if kv_format != "plain":
        cache = KVCache(model.config, len(windows), width, dtype=model.dtype, device=model.device, format=kv_format)
    hidden = model.transformer(ids, mask, cache, False, False).last_hidden_state  # [windows, width, D]
    losses = []
    for row, window in enumerate(windows):
        for first in range(window.scored, window.end, _LOGIT_TOKENS):
            end = min(first + _LOGIT_TOKENS, window.end)
            logits = model.lm_head(hidden[row, first - 1 - window.first : end - 1 - window.first]).float()
            losses.append(F.cross_entropy(logits, text[first:end].to(logits.device), reduction="none").cpu())
    return torch.cat(losses)
