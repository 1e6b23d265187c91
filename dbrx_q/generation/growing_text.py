"""The text of a sequence while its tokens are generated, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["GrowingText"]

# A special token that a stop string spells stands in the held text as one of these lone surrogates, which decoded UTF-8 never has.
_FIRST_STAND_IN = 0xDC00


class GrowingText:
    """The text of one sequence. Holds back incomplete characters, and text that may still become a stop string.

    Special tokens are no part of the text. A stop string that spells special tokens, alone or among other text, matches these tokens by
    their ids; it also matches ordinary tokens that spell it.
    """

    stopped: bool
    """Whether the text has reached a stop string."""

    def __init__(self, tokenizer: DbrxTokenizer | None, stop: Sequence[str]) -> None:
        """
        Args:
            tokenizer: turns tokens into text; without it the text stays empty.
            stop: the stop strings.
        """
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder(skip_special_tokens=True)
        specials = {} if tokenizer is None or not stop else tokenizer.special_tokens
        spelled = sorted((spelling for spelling in specials if any(spelling in text for text in stop)), key=len, reverse=True)
        stand_ins = {spelling: chr(_FIRST_STAND_IN + index) for index, spelling in enumerate(spelled)}
        self._stand_ins = {specials[spelling]: stand_in for spelling, stand_in in stand_ins.items()}
        self._hidden = dict.fromkeys(map(ord, stand_ins.values()))
        by_id = list(stop)
        for spelling, stand_in in stand_ins.items():
            by_id = [text.replace(spelling, stand_in) for text in by_id]
        self._stop = tuple(dict.fromkeys([*stop, *by_id]))
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        if self._decoder is None:
            return ""
        if token in self._stand_ins:
            return self._release(self._decoder.flush() + self._stand_ins[token])
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """The text that was held back, when no token follows."""
        if self._decoder is None or self.stopped:
            return ""
        released = self._release(self._decoder.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        return released + self._shown(rest)

    def _release(self, text: str) -> str:
        self._held += text
        stops = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if stops:
            self.stopped = True
            released, self._held = self._held[: min(stops)], ""
            return self._shown(released)
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._shown(released)

    def _shown(self, text: str) -> str:
        return text.translate(self._hidden) if self._hidden else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop` and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
