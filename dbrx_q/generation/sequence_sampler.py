"""Sequences of one length that a model writes by itself, at temperature 1, without top-k or top-p: tokens as the model distributes them.

All sequences of a batch advance in one forward pass, so that each expert that is read, copied or dequantized serves all of them. Random
numbers belong to a sequence and a position, so they do not depend on the batch.

Dimension letters: `N` sequences, `S` tokens of each, `B` sequences of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError, TokenizerError
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite, overflow_error, repeat_sequence
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["DEFAULT_STARTS", "SequenceStart", "TextTokens", "draw_tokens", "sample_sequences"]

_ROWS = 16  # whose probabilities are summed at a time: 13 MB in float64 for DBRX's vocabulary of 100,352


@dataclass(frozen=True)
class SequenceStart:
    """The tokens that a document begins with, before the model writes it.

    Raises:
        RequestError: fewer than 0 seed tokens, or none and no bos.
    """

    bos: bool
    """Whether it begins with the tokenizer's bos; a tokenizer without bos gives one more seed token instead."""
    seed_tokens: int = 0
    """How many random tokens follow, each drawn uniformly from the tokens of text."""

    def __post_init__(self) -> None:
        if self.seed_tokens < 0 or not (self.bos or self.seed_tokens):
            raise RequestError(f"a document must begin with bos or at least 1 seed token; found {self.seed_tokens} without bos. Give more")


DEFAULT_STARTS = tuple(SequenceStart(tokens == 0, tokens) for tokens in (0, 1, 0, 4, 0, 16))
"""Sequence i begins as start i modulo their number says: half of them with bos, the others with 1, 4 or 16 random tokens."""


@dataclass(frozen=True)
class TextTokens:
    """Which tokens a sequence may hold."""

    text: torch.Tensor
    """bool [V], True for the tokens of text: the tokenizer has them, and they are not special."""
    bos: int | None
    """The token that a document begins with; None without one."""
    end: int | None
    """The token that ends a document; None without one."""

    @classmethod
    def of(cls, tokenizer: DbrxTokenizer, vocab_size: int) -> TextTokens:
        """Those of a model with `vocab_size` ids, some of which may pad the vocabulary.

        Raises:
            TokenizerError: no id is a token of text.
        """
        special = set(tokenizer.special_tokens.values())
        text = torch.tensor([tokenizer.has_token(i) and i not in special for i in range(vocab_size)])
        if not bool(text.any()):
            raise TokenizerError(
                f"the tokenizer must have tokens of text below the model's {vocab_size:,} ids; found none. Use the model's"
            )
        bos, end = (None if i is None or i >= vocab_size else i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        return cls(text, bos, end)

    @property
    def drawable(self) -> torch.Tensor:
        """bool [V], True for the tokens that the model may write: those of text, and the end of a document."""
        drawable = self.text.clone()
        if self.end is not None:
            drawable[self.end] = True
        return drawable


def sample_sequences(
    model: DbrxForCausalLM,
    tokens: TextTokens,
    *,
    count: int,
    length: int,
    seed: int,
    batch: int = 128,
    starts: Sequence[SequenceStart] = DEFAULT_STARTS,
    restart_every: int | None = None,
    first: int = 0,
    on_step: Callable[[int], None] = lambda done: None,
    on_batch: Callable[[torch.Tensor], None] = lambda rows: None,
) -> torch.Tensor:
    """int64 [N, S]: sequences that the model writes.

    A sequence whose document ends goes on with a new one, which begins as its first did and which sees nothing of the earlier one: where
    the end is also bos, as in DBRX, that token begins it. No other special token is written, and no id without a token.

    Args:
        model: a loaded model.
        tokens: which tokens a sequence may hold.
        count: N.
        length: S.
        seed: of all random numbers.
        batch: B, sequences that advance together.
        starts: how documents begin; sequence i takes the start of index i modulo their number.
        restart_every: tokens after which a document is cut and a new one begins; None to let it end by itself.
        first: sequences that are there already and are left out of the result; the others are those of a call without it, where it is a
            multiple of `batch`.
        on_step: called after every step with how many tokens have been sampled.
        on_batch: called after every batch with its sequences [B, S].

    Raises:
        RequestError: a count, length or batch that is not positive, a length beyond the model's context, a seed of more than 63 bits, or
            logits that are not finite.
    """
    _check(model, count, length, seed, batch, starts, restart_every)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, length, generator=generator, dtype=torch.float64)
    text = tokens.text.nonzero()[:, 0]
    seeds = text[torch.randint(len(text), (count, length), generator=generator)]
    sampled = [torch.empty(0, length, dtype=torch.int64)]
    for start in range(first, count, batch):
        rows = slice(start, min(start + batch, count))
        documents = _Documents(tokens, [starts[i % len(starts)] for i in range(rows.start, rows.stop)], seeds[rows], restart_every)
        sampled.append(_sample_batch(model, documents, numbers[rows], partial(_report, on_step, start * length)))
        on_batch(sampled[-1])
    return torch.cat(sampled)


def draw_tokens(logits: torch.Tensor, drawable: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [B]: a token of each row, by inversion of the cumulative distribution softmax(logits) over the drawable tokens.

    Args:
        logits: float32 [B, V].
        drawable: bool [V].
        numbers: float64 [B], uniform in [0, 1).
    """
    tokens = []
    for rows, uniform in zip(logits.split(_ROWS), numbers.split(_ROWS), strict=True):
        sums = rows.masked_fill(~drawable, -torch.inf).softmax(-1).double().cumsum(-1)  # [rows, V]
        total = sums[:, -1:]
        # Below the total, so that the token is the first whose sum exceeds the number: never one of probability 0.
        number = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens.append(torch.searchsorted(sums, number, right=True)[:, 0])
    return torch.cat(tokens)


class _Documents:
    """Where the documents of a batch begin, and the tokens that they begin with."""

    def __init__(self, tokens: TextTokens, starts: Sequence[SequenceStart], seeds: torch.Tensor, restart_every: int | None) -> None:
        self.drawable = tokens.drawable
        self._bos, self._end, self._seeds, self._restart_every = tokens.bos, tokens.end, seeds, restart_every
        self._has_bos = torch.tensor([start.bos and tokens.bos is not None for start in starts])  # [B]
        self._given = (self._has_bos + torch.tensor([start.seed_tokens for start in starts])).clamp(min=1)  # [B], tokens of a start
        self._age = torch.zeros(len(starts), dtype=torch.int64)  # [B], tokens of each document so far

    @property
    def all_given(self) -> bool:
        """Whether no sequence takes its next token from the model."""
        return bool((self._age < self._given).all())

    def next_tokens(self, column: int, drawn: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
        """(the tokens int64 [B] of a column, the sequences of which a document begins with this token).

        Args:
            column: 0 to S - 1.
            drawn: int64 [B], what the model writes; None where no sequence takes it.
        """
        given = self._age < self._given
        tokens = self._seeds[:, column]
        if self._bos is not None:
            tokens = tokens.where(~(self._has_bos & (self._age == 0)), self._bos)
        if drawn is not None:
            tokens = tokens.where(given, drawn)
        ended = ~given & (tokens == (-1 if self._end is None else self._end))
        begins = (self._age == 0) | (ended & self._has_bos & (self._end == self._bos))
        self._age = torch.where(begins, 1, self._age + 1)
        self._age[ended & ~begins] = 0
        if self._restart_every is not None:
            self._age[self._age >= self._restart_every] = 0
        return tokens, begins.nonzero()[:, 0].tolist()


def _sample_batch(model: DbrxForCausalLM, documents: _Documents, numbers: torch.Tensor, on_step: Callable[[int], None]) -> torch.Tensor:
    """int64 [B, S] for random numbers float64 [B, S]."""
    B, S = numbers.shape
    cache = KVCache(model.config, B, S, dtype=model.dtype, device=model.transformer.devices)
    sampled = torch.empty(B, S, dtype=torch.int64)
    logits: torch.Tensor | None = None  # [B, V]
    for column in range(S):
        drawn = None if logits is None or documents.all_given else draw_tokens(logits, documents.drawable, numbers[:, column])
        sampled[:, column], begins = documents.next_tokens(column, drawn)
        for row in begins:
            cache.lengths[row] = 0
        if column + 1 < S:
            output = model(sampled[:, column : column + 1], past_key_values=cache, output_router_logits=False)
            logits = output.logits[:, -1].float().cpu()  # drawn on the CPU, so that every device draws the same
            if not all_finite(logits):
                row = next(b for b, row in enumerate(logits) if not all_finite(row))
                document = sampled[row, column + 1 - cache.lengths[row] : column + 1].tolist()
                raise overflow_error(model, partial(repeat_sequence, model, document))
        on_step((column + 1) * B)
    return sampled


def _report(on_step: Callable[[int], None], before: int, done: int) -> None:
    on_step(before + done)


def _check(
    model: DbrxForCausalLM, count: int, length: int, seed: int, batch: int, starts: Sequence[SequenceStart], restart_every: int | None
) -> None:
    if count < 1 or length < 2 or batch < 1:
        raise RequestError(
            f"sampling takes at least 1 sequence of at least 2 tokens, and batches of at least 1; found {count}, {length}, {batch}"
        )
    if length > model.config.context_length:
        raise RequestError(
            f"a sequence must fit the model's context of {model.config.context_length:,} tokens; found {length:,}. Give a smaller --length"
        )
    if not 0 <= seed < 1 << 63:
        raise RequestError(f"the seed of sampled sequences must be from 0 to 2^63 - 1; found {shortened(seed)}")
    if not starts:
        raise RequestError("starts must name at least one SequenceStart; found none. Leave them out for the default")
    if restart_every is not None and restart_every < 2:
        raise RequestError(f"restart_every must be at least 2 tokens; found {restart_every}. Give more, or None")
