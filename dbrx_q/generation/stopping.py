"""What ends sequences: their length, end tokens, stop strings, time, and criteria of the caller.

Dimension letters: `R` sequences, `n` tokens so far, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dbrx_q.errors import RequestError

__all__ = ["Criterion", "StopStrings", "Stopping"]

Criterion = Callable[[torch.Tensor, Any], Any]


class StopStrings:
    """Tells whether the last token of a sequence completes a stop string. Prompts and special tokens count as text.

    Args:
        strings: the stop strings.
        tokenizer: a `DbrxTokenizer`, or any tokenizer with `decode`.

    Raises:
        RequestError: no tokenizer, or an empty string.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        if tokenizer is None:
            raise RequestError(f"stop_strings need the model's tokenizer; found {self._strings} without one. Pass tokenizer=")
        if not self._strings or any(not isinstance(text, str) or not text for text in self._strings):
            raise RequestError(f"stop_strings must be strings that are not empty; found {strings!r}")
        self._bytes = [text.encode() for text in self._strings]
        self._longest = max(map(len, self._bytes))
        self._tokenizer = tokenizer

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether `ids` end with a token that completes a stop string."""
        tail = list(ids[-self._longest :])
        if not hasattr(self._tokenizer, "token_bytes"):
            text = self._tokenizer.decode(tail, skip_special_tokens=False)
            before = len(self._tokenizer.decode(tail[:-1], skip_special_tokens=False))
            return any(text.rfind(stop) + len(stop) > before for stop in self._strings if stop in text)
        pieces = [self._tokenizer.token_bytes([token]) if self._tokenizer.has_token(token) else b"\xff" for token in tail]
        data = b"".join(pieces)
        before = len(data) - len(pieces[-1])
        return any(data.rfind(stop) + len(stop) > before for stop in self._bytes if stop in data)


class Stopping:
    """Decides which sequences have ended, after each token.

    Args:
        ends: tokens that end a sequence; None for none.
        max_length: tokens of a sequence, prompt included, in columns of the batch.
        stop_strings: None for none.
        max_time: seconds from now; None for no limit.
        custom: criteria of the caller, called with (ids [R, n], scores so far or None); True, or True for each sequence, ends it.
    """

    def __init__(
        self,
        ends: Sequence[int] | None,
        max_length: int,
        stop_strings: StopStrings | None = None,
        max_time: float | None = None,
        custom: Sequence[Criterion] = (),
    ) -> None:
        if max_time is not None and not max_time > 0:
            raise RequestError(f"max_time must be a number of seconds above 0; found {max_time}")
        self._ends = frozenset(ends or ())
        self._max_length, self._stop_strings, self._custom = max_length, stop_strings, list(custom)
        self._deadline = None if max_time is None else time.perf_counter() + max_time

    def __call__(self, ids: torch.Tensor, tokens: Sequence[int], scores: Any) -> list[bool]:
        """Which sequences have ended with their last token.

        Args:
            ids: int64 [R, n], with the last tokens.
            tokens: the last token of each sequence.
            scores: the scores of every step, for criteria of the caller; None where they are not kept.
        """
        late = self._deadline is not None and time.perf_counter() > self._deadline
        full = late or ids.shape[1] >= self._max_length
        ended = [full or token in self._ends for token in tokens]
        if self._stop_strings is not None:
            ended = [done or self._stop_strings(row) for done, row in zip(ended, ids.tolist(), strict=True)]
        for criterion in self._custom:
            answer = criterion(ids, scores)
            answers = answer.tolist() if isinstance(answer, torch.Tensor) and answer.ndim else [bool(answer)] * len(tokens)
            ended = [done or bool(more) for done, more in zip(ended, answers, strict=True)]
        return ended
