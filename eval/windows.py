"""Protocols of published perplexities: how a text is cut into windows, and which tokens of each window are predicted."""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError

__all__ = ["PROTOCOLS", "Protocol", "Window"]

PROTOCOLS = ("non-overlapping", "half-window", "strided")


@dataclass(frozen=True)
class Window:
    """Tokens first .. end-1 of a text, which run together."""

    first: int
    """Index of the first token."""
    end: int
    """Index one past the last token."""
    scored: int
    """Index of the first token that is predicted; the tokens before it are context only."""

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return self.end - self.scored


@dataclass(frozen=True)
class Protocol:
    """One way to cut a text.

    - "non-overlapping": windows side by side. Every token of a window but its first is predicted; a remainder shorter than a window is
      left out (Frantar et al. 2022, GPTQ: context 2048).
    - "half-window": the same windows, of which only the second half is predicted, so that every prediction has at least half a window of
      context (llama.cpp's llama-perplexity: context 512).
    - "strided": a window begins every `stride` tokens. Only tokens that no earlier window predicted count, up to the last token of the
      text (Hugging Face's guide to perplexity).
    """

    name: str
    """One of `PROTOCOLS`."""
    context: int
    """Tokens of a window."""
    stride: int
    """Tokens between the starts of two windows; equal to `context` except for "strided"."""
    limit: int | None = None
    """Windows to measure at most, from the start of the text; None for all."""

    @classmethod
    def of(cls, context: int, *, stride: int | None = None, half_window: bool = False, limit: int | None = None) -> Protocol:
        """The protocol for these options; a stride below the context selects "strided".

        Raises:
            RequestError: a value out of range, or a stride for half windows.
        """
        if context < 2:
            raise RequestError(f"the context must be at least 2 tokens; found {context}")
        if stride is not None and not 1 <= stride <= context:
            raise RequestError(f"the stride must be from 1 to the context of {context} tokens; found {stride}")
        if limit is not None and limit < 1:
            raise RequestError(f"at least one window must be measured; found a limit of {limit}")
        if half_window and stride not in (None, context):
            raise RequestError(f"half windows must not overlap; found a stride of {stride}. Leave out the stride or the half windows")
        if half_window and context < 4:
            raise RequestError(f"half windows must have a context of at least 4 tokens; found {context}")
        step = context if stride is None else stride
        name = "half-window" if half_window else "non-overlapping" if step == context else "strided"
        return cls(name, context, step, limit)

    def check(self, tokens: int, config: DbrxConfig, *, source: str = "the text") -> None:
        """Refuse a text of `tokens` tokens that has no whole window, or a context that the model lacks. Errors call the text `source`.

        Raises:
            RequestError: in either case.
        """
        if self.context > config.max_seq_len:
            raise RequestError(f"the context must be from 2 to the model's {config.max_seq_len} tokens; found {self.context}")
        if tokens < self.context:
            raise RequestError(
                f"{source} must fill one window of {self.context} tokens; it has {tokens}. Use a longer text or a smaller --context"
            )

    def windows(self, tokens: int) -> list[Window]:
        """Cut a text of `tokens` tokens."""
        windows = self._strided(tokens) if self.name == "strided" else self._side_by_side(tokens)
        return windows[: self.limit]

    def _side_by_side(self, tokens: int) -> list[Window]:
        # llama-perplexity predicts from the logits of positions context / 2 to context - 2.
        context_only = self.context // 2 + 1 if self.name == "half-window" else 1
        return [Window(first, first + self.context, first + context_only) for first in range(0, tokens - self.context + 1, self.context)]

    def _strided(self, tokens: int) -> list[Window]:
        windows, scored = [], 1
        for first in range(0, tokens, self.stride):
            end = min(first + self.context, tokens)
            windows.append(Window(first, end, scored))
            scored = end
            if end == tokens:
                break
        return windows
