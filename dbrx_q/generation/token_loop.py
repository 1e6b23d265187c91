"""The loop of every generation: choose tokens from logits, append them, get the next logits.

Dimension letters: `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from .decoding import Decoder

__all__ = ["Steps", "prefill_all", "token_steps"]


class Steps(Protocol):
    """What appends tokens: a `Decoder`, or a `ForwardDecoder`."""

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Append one token to each of the given sequences; float32 logits [V] of the token that follows, by index of the sequence."""

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each sequence i go on as a copy of sequence `sources[i]`."""


def prefill_all(decoder: Decoder, prompts: Sequence[Sequence[int]], copies: int = 1) -> dict[int, torch.Tensor]:
    """Run the prompts; float32 logits [V] of the token that follows, by index of the sequence.

    Args:
        decoder: has room for `copies` sequences of each prompt.
        prompts: the ids of each.
        copies: sequences that begin with each prompt, which is computed once; those of a prompt have neighbouring indices.
    """
    logits = {}
    for number, prompt in enumerate(prompts):
        first = number * copies
        logits[first] = decoder.prefill(first, prompt)
        for index in range(first + 1, first + copies):
            decoder.fork(first, index)
            logits[index] = logits[first]
    return logits


def token_steps(
    decoder: Steps,
    logits: dict[int, torch.Tensor],
    choose: Callable[[Mapping[int, torch.Tensor]], dict[int, int]],
    goes_on: Callable[[int], bool],
) -> Iterator[dict[int, int]]:
    """Yield the tokens of each step, by index of the sequence, until no sequence goes on.

    Args:
        decoder: holds the sequences.
        logits: float32 [V] of the first new token of each sequence.
        choose: returns a token for each sequence of the given logits.
        goes_on: asked after each step, once the caller has seen its tokens, whether a sequence gets another token.
    """
    while logits:
        tokens = choose(logits)
        yield tokens
        unfinished = {i: token for i, token in tokens.items() if goes_on(i)}
        logits = decoder.step(unfinished) if unfinished else {}
