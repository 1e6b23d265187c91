"""Streamers of `model.generate`, with the protocol of transformers: `put` receives the prompt's ids, then each token; then `end` is called.

The text has whole characters only and is shown as soon as it is complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING, Any

import torch

from dbrx_q.errors import RequestError

if TYPE_CHECKING:
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["BaseStreamer", "TextIteratorStreamer", "TextStreamer"]


class BaseStreamer(ABC):
    """What `streamer=` expects."""

    @abstractmethod
    def put(self, value: torch.Tensor) -> None:
        """Receive ids: first those of the prompts [B, n], then a token of each sequence [B]."""

    @abstractmethod
    def end(self) -> None:
        """The sequences have ended."""


class TextStreamer(BaseStreamer):
    """Prints the text of one sequence while it is generated.

        model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))

    Args:
        tokenizer: of the model.
        skip_prompt: whether to leave out the prompt.
        skip_special_tokens: whether to leave out special tokens.
    """

    def __init__(self, tokenizer: DbrxTokenizer, skip_prompt: bool = False, *, skip_special_tokens: bool = False) -> None:
        self.tokenizer, self.skip_prompt = tokenizer, skip_prompt
        self._decoder = tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
        self._at_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if value.ndim > 1 and len(value) > 1:
            raise RequestError(f"a text streamer takes one sequence; found {len(value)}. Generate one prompt at a time")
        at_prompt, self._at_prompt = self._at_prompt, False
        if not (at_prompt and self.skip_prompt):
            self.on_finalized_text("".join(self._decoder.push(token) for token in value.flatten().tolist()))

    def end(self) -> None:
        self._at_prompt = True
        self.on_finalized_text(self._decoder.flush(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of text; a subclass may do something else with it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Yields the pieces of text, to a loop that runs while another thread generates.

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 50}).start()
        for piece in streamer:
            print(piece, end="")

    Args:
        tokenizer, skip_prompt, skip_special_tokens: as for `TextStreamer`.
        timeout: seconds to wait for a piece, after which `queue.Empty` is raised; None for ever.
    """

    def __init__(
        self, tokenizer: DbrxTokenizer, skip_prompt: bool = False, timeout: float | None = None, *, skip_special_tokens: bool = False
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self._pieces: Queue[Any] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece: str | None = self._pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
