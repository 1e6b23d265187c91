"""Log-likelihoods of continuations, where tokens that several requests begin with run once.

Requests are sorted by their tokens. What all contexts of a batch begin with runs into a cache of one sequence, the trunk, of which the
next batch keeps what it begins with too. The trunk is forked to one sequence for each context, and these to one for each continuation,
all of whose tokens but the last run. The last state of a context predicts the first token of every continuation.

Batches whose answers are known already do not run. What the trunk would hold after them is run when a batch needs it, in the same pieces
as it would have been, so that every other answer is the same to the last bit.

Dimension letters: `P` places whose next token is asked for, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dbrx_q.errors import RequestError
from dbrx_q.eval.observe import LOGIT_TOKENS, STEP_TOKENS, check_ids
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM, batch_of

__all__ = ["CACHES", "Continuation", "PrefixScorer", "TokenCounts"]

CACHES = 3
"""Of keys and values, each of at most one context: what requests begin with, and copies of it for contexts and for continuations."""


@dataclass(frozen=True, order=True)
class Continuation:
    """A request: what is the probability of `tokens` after `context`? Both hold at least one token."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class TokenCounts:
    """requested: tokens that the requests would run, each by itself. prefilled: tokens that were run, also for answers that are kept.

    cut: requests whose contexts were longer than the model's and lost their beginning.
    """

    requested: int = 0
    prefilled: int = 0
    cut: int = 0


@dataclass
class _Row:
    """New tokens of one sequence; `asked`: (place, index of the request, the token that came after this place)."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, int, int]] = field(default_factory=list)


class PrefixScorer:
    """Scores continuations, and remembers the last trunk from one call to the next.

    Args:
        model: a loaded model.
        batch_size: requests that run together, at most; fewer where they would hold more tokens than one context of the model.
        kv_format: "plain", "int8" or "int4".

    Attributes:
        counts: of all calls.

    Raises:
        RequestError: a batch size below 1, or an unknown format.
    """

    def __init__(self, model: DbrxForCausalLM, *, batch_size: int = 1, kv_format: str = "plain") -> None:
        if batch_size < 1:
            raise RequestError(f"a batch must hold at least 1 request; found {batch_size}")
        self.counts = TokenCounts()
        self._model, self._batch_size = model, batch_size
        self._limit = model.config.max_seq_len  # tokens of a cache
        if model.limits.kv_bytes is not None:
            each = KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=kv_format).nbytes
            self._limit = min(self._limit, model.limits.kv_bytes // each // CACHES)
        places = model.transformer.devices
        self._trunk = KVCache(model.config, 1, 1, dtype=model.dtype, device=places, format=kv_format, grows=True, limit=self._limit)
        self._held: tuple[int, ...] = ()  # the trunk's tokens
        self._pieces: list[tuple[int, tuple[int, ...]]] = []  # what ran into the trunk: (place of its first token, tokens)
        self._known = self._behind = False  # whether the batch's answers are; whether the trunk lacks what did not run for them

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Continuation],
        *,
        known: Mapping[int, tuple[float, bool]] | None = None,
        on_scored: Callable[[int, int], None] | None = None,
        on_answers: Callable[[Mapping[int, tuple[float, bool]]], None] | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of the tokens' log-probabilities in nats, whether each token is the most probable one) of every request, in their order.

        Args:
            requests: any number.
            known: answers of the same call that was not finished, by index of the request.
            on_scored: called with (requests done, in all) after every batch.
            on_answers: called with the answers of every batch, by index of the request, before `on_scored`.

        Raises:
            RequestError: a request without context or without tokens, one that the model's context cannot hold, or ids out of range.
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
            whole = self._limit == self._model.config.max_seq_len
            room = f"the model's context of {self._limit}" if whole else f"the {self._limit} tokens that the model was given memory for"
            raise RequestError(
                f"a context and all but the last token of its continuation must fit {room}; found {_size(request)}. Truncate the context"
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
        contexts = list(dict.fromkeys(requests[i].context for i in batch))  # still in order
        if len(batch) == 1:
            self._extend(self._whole(batch[0], self._keep(contexts[0][:-1])))
            return
        if len(contexts) == 1:
            shared = self._keep(contexts[0][:-1])
        else:
            # Of sorted contexts the first and the last differ earliest. The last token of a context always runs, for its state.
            shared = min(_common(contexts[0], contexts[-1]), min(map(len, contexts)) - 1)
            trunk = contexts[0][:shared]
            self._extend(_Row(trunk[self._keep(trunk) :]))
            if len(contexts) == len(batch):
                cache = self._fork(self._trunk, [0] * len(batch), max(_size(requests[i]) for i in batch))
                self._run(cache, [self._whole(i, shared) for i in batch])
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
            self._run(self._fork(cache, sequences, max(_size(requests[i]) for i in longer)), [self._rest(i) for i in longer])

    def _fork(self, cache: KVCache, rows: list[int], capacity: int) -> KVCache:
        return cache if self._known else cache.forked(rows, capacity)

    def _extend(self, row: _Row) -> None:
        """Append to the trunk."""
        if self._known:
            self._trunk.reserve(len(self._held) + len(row.tokens))  # memory grows as it would have
            self._behind = True
        self._run(self._trunk, [row])
        if row.tokens:
            self._pieces.append((len(self._held), row.tokens))
            self._held += row.tokens

    def _catch_up(self) -> None:
        """Run what the trunk lacks, piece by piece: tokens that run together in other numbers differ in their last bits."""
        for start, tokens in self._pieces:
            self._trunk.lengths = [start]
            self._run_model(self._trunk, [_Row(tokens)])
        self._trunk.lengths = [len(self._held)]
        self._behind = False

    def _keep(self, tokens: tuple[int, ...]) -> int:
        """Cut the trunk down to what `tokens` begin with; how many tokens that are."""
        kept = _common(self._held, tokens)
        self._held = self._held[:kept]
        self._pieces = [piece for piece in self._pieces if piece[0] < kept]
        self._trunk.lengths = [kept]
        return kept

    def _whole(self, i: int, known: int) -> _Row:
        """A request without its first `known` tokens, which end before its context does."""
        context, tokens = self._requests[i].context, self._requests[i].tokens
        first = len(context) - 1 - known
        return _Row((*context, *tokens)[known:-1], [(first + place, i, token) for place, token in enumerate(tokens)])

    def _rest(self, i: int) -> _Row:
        """A continuation whose first token is predicted already."""
        tokens = self._requests[i].tokens
        return _Row(tokens[:-1], [(place, i, token) for place, token in enumerate(tokens[1:])])

    def _run(self, cache: KVCache, rows: Sequence[_Row]) -> None:
        """Append each row's tokens to its sequence, and score what is asked; only count them where answers are known."""
        self.counts.prefilled += sum(len(row.tokens) for row in rows)
        if not self._known:
            self._run_model(cache, rows)

    def _run_model(self, cache: KVCache, rows: Sequence[_Row]) -> None:
        """As many tokens together as a step may bring."""
        model = self._model
        longest = max(len(row.tokens) for row in rows)
        cache.reserve(max(length + len(row.tokens) for length, row in zip(cache.lengths, rows, strict=True)))
        width = max(1, STEP_TOKENS // len(rows))
        for first in range(0, longest, width):
            pieces = [row.tokens[first : first + width] for row in rows]
            counts = [len(piece) for piece in pieces]
            ids = torch.tensor([token for piece in pieces for token in piece])
            hidden, _ = model.transformer.run(ids.to(model.device), batch_of(counts, cache.lengths, cache, model.device))  # [T, D]
            cache.advance(counts)
            asked, start = [], -first
            for row, count in zip(rows, counts, strict=True):
                asked += [(start + place, i, token) for place, i, token in row.asked if first <= place < first + count]
                start += count
            self._score(hidden, asked)

    def _score(self, hidden: torch.Tensor, asked: Sequence[tuple[int, int, int]]) -> None:
        """Add to the sums what the states `hidden` [T, D] say of (place, request, token)."""
        places = sorted({place for place, _, _ in asked})
        for first in range(0, len(places), LOGIT_TOKENS):
            slots = {place: slot for slot, place in enumerate(places[first : first + LOGIT_TOKENS])}
            states = hidden[torch.tensor(list(slots), device=hidden.device)]  # [P, D]
            log_p = self._model.lm_head(states).double().log_softmax(-1)  # [P, V]
            wanted = [(slots[place], i, token) for place, i, token in asked if place in slots]
            rows, tokens = (torch.tensor([one[k] for one in wanted], device=log_p.device) for k in (0, 2))
            values, best = log_p[rows, tokens].tolist(), (log_p.argmax(-1)[rows] == tokens).tolist()
            for (_, i, _), value, most_probable in zip(wanted, values, best, strict=True):
                self._sums[i] += value
                self._greedy[i] &= most_probable


def _size(request: Continuation) -> int:
    """Tokens that run."""
    return len(request.context) + len(request.tokens) - 1


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    same = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        same += 1
    return same
