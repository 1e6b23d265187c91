"""Computes log-likelihoods of continuations; a prefix that several requests share runs once.

Requests are sorted by their tokens. The common prefix of a batch's contexts runs into a KV cache of one sequence, the trunk. The next batch
keeps the part of the trunk that is a prefix of its own contexts. The trunk is forked into one sequence per context, and these into one per
continuation. All tokens of a continuation but the last run. The last state of a context predicts the first token of every continuation.

A batch whose answers are known does not run. The tokens that it would have added to the trunk run when a later batch needs them, divided
into the same forward passes, so that all other answers are bit-identical.

Dimension letters: `P` positions whose next token is scored, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dbrx_q.errors import RequestError
from dbrx_q.eval.observe import LOGIT_TOKENS, STEP_TOKENS, check_ids
from dbrx_q.model.batch import batch_of
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite, finite_logits, overflow_error

__all__ = ["CACHES", "Continuation", "PrefixScorer", "TokenCounts"]

CACHES = 3
"""KV caches in use, each of at most one context of tokens: the trunk, and its copies for contexts and for continuations."""


@dataclass(frozen=True, order=True)
class Continuation:
    """A request for the probability of `tokens` after `context`."""

    context: tuple[int, ...]
    """At least one token id."""
    tokens: tuple[int, ...]
    """At least one token id."""


@dataclass
class TokenCounts:
    """Counts over all requests so far."""

    requested: int = 0
    """Tokens that would run if each request ran alone."""
    prefilled: int = 0
    """Tokens that ran, here or in the earlier run whose answers are reused."""
    truncated: int = 0
    """Requests whose context did not fit the model's and was truncated at its beginning."""


@dataclass
class _Row:
    """New tokens of one sequence."""

    tokens: tuple[int, ...]
    """Token ids that run."""
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    """(position in `tokens`, index of the request, the token to score after this position)."""


class PrefixScorer:
    """Scores continuations. The trunk of the last batch is kept from one call to the next.

    Args:
        model: a loaded model.
        batch_size: requests that run together at most; fewer where together they would have more tokens than one context of the model.
        kv_format: "plain", "int8" or "int4".

    Attributes:
        counts: over all calls.

    Raises:
        RequestError: the batch size is below 1, or the format is unknown.
    """

    def __init__(self, model: DbrxForCausalLM, *, batch_size: int = 1, kv_format: str = "plain") -> None:
        if batch_size < 1:
            raise RequestError(f"a batch must have at least 1 request; found {batch_size}. Choose another batch size")
        self.counts = TokenCounts()
        self._model, self._batch_size = model, batch_size
        self._limit = model.config.max_seq_len  # tokens of a cache
        if model.limits.kv_bytes is not None:
            token_bytes = KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=kv_format).nbytes
            self._limit = min(self._limit, model.limits.kv_bytes // token_bytes // CACHES)
        devices = model.transformer.devices
        self._trunk = KVCache(model.config, 1, 1, dtype=model.dtype, device=devices, format=kv_format, grows=True, limit=self._limit)
        self._trunk_tokens: tuple[int, ...] = ()
        self._pieces: list[tuple[int, tuple[int, ...]]] = []  # forward passes into the trunk: (position of the first token, tokens)
        self._known = False  # whether the batch's answers are known
        self._behind = False  # whether the trunk's cache lacks tokens of batches that did not run

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Continuation],
        *,
        known: Mapping[int, tuple[float, bool]] | None = None,
        on_scored: Callable[[int, int], None] | None = None,
        on_answers: Callable[[Mapping[int, tuple[float, bool]]], None] | None = None,
    ) -> list[tuple[float, bool]]:
        """For every request: the sum of its tokens' log-probabilities in nats, and whether each token is the most probable one.

        Args:
            requests: any number.
            known: answers of an interrupted run with the same requests, by index of the request.
            on_scored: called with (requests done, total requests) after every batch.
            on_answers: called with the answers of every batch, by index of the request, before `on_scored`.

        Raises:
            RequestError: a request has no context or no tokens, does not fit the model's context, or has an id outside the vocabulary.
        """
        for request in requests:
            self._check(request)
        self._sums, self._greedy = [0.0] * len(requests), [True] * len(requests)
        self._requests = requests
        known = known or {}
        done = 0
        for batch in self._batches(sorted(range(len(requests)), key=lambda i: requests[i])):
            self._known = all(i in known for i in batch)
            if self._behind and not self._known:
                self._catch_up()
            self._run_batch(batch)
            if self._known:
                for i in batch:
                    self._sums[i], self._greedy[i] = known[i]
            if on_answers is not None:
                on_answers({i: (self._sums[i], self._greedy[i]) for i in batch})
            done += len(batch)
            if on_scored is not None:
                on_scored(done, len(requests))
        return list(zip(self._sums, self._greedy, strict=True))

    def _check(self, request: Continuation) -> None:
        if not request.context or not request.tokens:
            raise RequestError("a request must have a context and a continuation of at least one token each; found an empty one")
        if _size(request) > self._limit:
            model_limits = self._limit == self._model.config.max_seq_len
            limit = (
                f"the model's context of {self._limit}" if model_limits else f"the {self._limit} tokens that the KV cache has memory for"
            )
            raise RequestError(
                f"a context and all but the last token of its continuation must fit {limit}; found {_size(request)}. Truncate the context"
            )
        check_ids((*request.context, *request.tokens), self._model.config.vocab_size)

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        longest = 0
        for i in order:
            longest = max(longest, _size(self._requests[i]))
            full = not batches or len(batches[-1]) == self._batch_size
            if full or (len(batches[-1]) + 1) * longest > self._limit:
                batches.append([])
                longest = _size(self._requests[i])
            batches[-1].append(i)
        return batches

    def _run_batch(self, batch: list[int]) -> None:
        requests = self._requests
        self.counts.requested += sum(_size(requests[i]) for i in batch)
        contexts = list(dict.fromkeys(requests[i].context for i in batch))  # still sorted
        if len(batch) == 1:
            self._extend(self._request_row(batch[0], self._keep(contexts[0][:-1])))
            return
        if len(contexts) == 1:
            shared = self._keep(contexts[0][:-1])
        else:
            # The first and the last of sorted contexts have the shortest common prefix. The last token of a context always runs, as its
            # state predicts.
            shared = min(_common_prefix_length(contexts[0], contexts[-1]), min(map(len, contexts)) - 1)
            trunk = contexts[0][:shared]
            self._extend(_Row(trunk[self._keep(trunk) :]))
            if len(contexts) == len(batch):
                cache = self._fork(self._trunk, [0] * len(batch), max(_size(requests[i]) for i in batch))
                self._run(cache, [self._request_row(i, shared) for i in batch])
                return
        row_of = {context: _Row(context[shared:]) for context in contexts}
        for i in batch:
            row = row_of[requests[i].context]
            row.asked.append((len(row.tokens) - 1, i, requests[i].tokens[0]))
        if len(contexts) == 1:
            cache = self._trunk
            self._extend(row_of[contexts[0]])
        else:
            cache = self._fork(self._trunk, [0] * len(contexts), max(map(len, contexts)))
            self._run(cache, list(row_of.values()))
        longer = [i for i in batch if len(requests[i].tokens) > 1]
        if longer:
            sequences = [contexts.index(requests[i].context) for i in longer]
            self._run(self._fork(cache, sequences, max(_size(requests[i]) for i in longer)), [self._continuation_row(i) for i in longer])

    def _fork(self, cache: KVCache, rows: list[int], capacity: int) -> KVCache:
        return cache if self._known else cache.forked(rows, capacity)

    def _extend(self, row: _Row) -> None:
        """Append a row's tokens to the trunk."""
        if self._known:
            self._trunk.reserve(len(self._trunk_tokens) + len(row.tokens))  # as if the tokens had run
            self._behind = True
        self._run(self._trunk, [row])
        if row.tokens:
            self._pieces.append((len(self._trunk_tokens), row.tokens))
            self._trunk_tokens += row.tokens

    def _catch_up(self) -> None:
        """Run the tokens that the trunk lacks, divided as they would have run: another division changes the last bits of their states."""
        for start, tokens in self._pieces:
            self._trunk.lengths = [start]
            self._run_model(self._trunk, [_Row(tokens)])
        self._trunk.lengths = [len(self._trunk_tokens)]
        self._behind = False

    def _keep(self, tokens: tuple[int, ...]) -> int:
        """Truncate the trunk to its common prefix with `tokens`; returns the prefix's length."""
        kept = _common_prefix_length(self._trunk_tokens, tokens)
        self._trunk_tokens = self._trunk_tokens[:kept]
        self._pieces = [piece for piece in self._pieces if piece[0] < kept]
        self._trunk.lengths = [kept]
        return kept

    def _request_row(self, i: int, known: int) -> _Row:
        """A request's row without its first `known` tokens, which are fewer than those of its context."""
        context, tokens = self._requests[i].context, self._requests[i].tokens
        first = len(context) - 1 - known
        return _Row((*context, *tokens)[known:-1], [(first + position, i, token) for position, token in enumerate(tokens)])

    def _continuation_row(self, i: int) -> _Row:
        """The row of a continuation whose first token has been scored already."""
        tokens = self._requests[i].tokens
        return _Row(tokens[:-1], [(position, i, token) for position, token in enumerate(tokens[1:])])

    def _run(self, cache: KVCache, rows: Sequence[_Row]) -> None:
        """Append each row's tokens to its sequence and score what it asks for; if the answers are known, only count the tokens."""
        self.counts.prefilled += sum(len(row.tokens) for row in rows)
        if not self._known:
            self._run_model(cache, rows)

    def _run_model(self, cache: KVCache, rows: Sequence[_Row]) -> None:
        """Run rows in forward passes of at most `STEP_TOKENS` tokens."""
        model = self._model
        longest = max(len(row.tokens) for row in rows)
        cache.reserve(max(length + len(row.tokens) for length, row in zip(cache.lengths, rows, strict=True)))
        width = max(1, STEP_TOKENS // len(rows))
        for first in range(0, longest, width):
            pieces = [row.tokens[first : first + width] for row in rows]
            counts = [len(piece) for piece in pieces]
            ids = torch.tensor([token for piece in pieces for token in piece])
            batch = batch_of(counts, cache.lengths, cache, model.device)
            hidden, _ = model.transformer.run(ids.to(model.device), batch)  # [T, D]
            if not all_finite(hidden):
                raise overflow_error(model, partial(model.transformer.run, ids.to(model.device), batch))
            cache.advance(counts)
            asked, start = [], -first
            for row, count in zip(rows, counts, strict=True):
                asked += [(start + position, i, token) for position, i, token in row.asked if first <= position < first + count]
                start += count
            self._score(hidden, asked)

    def _score(self, hidden: torch.Tensor, asked: Sequence[tuple[int, int, int]]) -> None:
        """Add the log-probability of each (position, request, token), predicted by the states `hidden` [T, D], to its request's sum."""
        positions = sorted({position for position, _, _ in asked})
        for first in range(0, len(positions), LOGIT_TOKENS):
            row_of = {position: row for row, position in enumerate(positions[first : first + LOGIT_TOKENS])}
            states = hidden[torch.tensor(list(row_of), device=hidden.device)]  # [P, D]
            log_p = finite_logits(self._model, states).double().log_softmax(-1)  # [P, V]
            scored = [(row_of[position], i, token) for position, i, token in asked if position in row_of]
            rows, tokens = (torch.tensor([entry[k] for entry in scored], device=log_p.device) for k in (0, 2))
            values, best = log_p[rows, tokens].tolist(), (log_p.argmax(-1)[rows] == tokens).tolist()
            for (_, i, _), value, most_probable in zip(scored, values, best, strict=True):
                self._sums[i] += value
                self._greedy[i] &= most_probable


def _size(request: Continuation) -> int:
    """Tokens of a request that run."""
    return len(request.context) + len(request.tokens) - 1


def _common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
