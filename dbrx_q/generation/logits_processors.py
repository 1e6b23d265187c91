"""What changes the scores of the next token, in the order and with the values of transformers.

A processor is called with (ids int64 [R, n], scores float32 [R, V]) and returns the new scores.

Dimension letters: `R` sequences, `n` tokens so far, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.generation_config import GenerationConfig

__all__ = ["Processor", "processors_of"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def processors_of(
    config: GenerationConfig,
    *,
    ends: Sequence[int] | None,
    prompt_length: int,
    padding: torch.Tensor | None,
    max_length: int,
    custom: Sequence[Processor],
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None,
    copies: int,
    vocabulary: int,
) -> list[Processor]:
    """The processors that a configuration asks for, in their order.

    Args:
        config: with its defaults filled in.
        ends: tokens that end a sequence; None for none.
        prompt_length: columns of the prompts.
        padding: int64 [R], leading columns of each prompt that are padding; None for no mask.
        max_length: tokens of a finished sequence.
        custom: the caller's own; they stand before those of sampling.
        prefix_allowed_tokens_fn: called with (index of the prompt, tokens so far); returns the tokens that may follow.
        copies: sequences of each prompt.
        vocabulary: V.

    Raises:
        RequestError: a value out of range.
    """
    result: list[Processor] = []
    if config.sequence_bias is not None:
        result.append(_SequenceBias(_bias_of(config.sequence_bias), vocabulary, "sequence_bias"))
    if config.repetition_penalty not in (None, 1.0):
        _check("repetition_penalty", config.repetition_penalty, config.repetition_penalty > 0, "above 0")
        result.append(_RepetitionPenalty(config.repetition_penalty, padding))
    if config.no_repeat_ngram_size:
        _check("no_repeat_ngram_size", config.no_repeat_ngram_size, config.no_repeat_ngram_size > 0, "0 (none) or more")
        result.append(_NoRepeatNgrams(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        result.append(_SequenceBias(_bad_words(config.bad_words_ids, ends), vocabulary, "bad_words_ids"))
    shortest = config.min_length or 0
    if config.min_new_tokens is not None:
        shortest = config.min_new_tokens + prompt_length
    if shortest > 0 and ends is not None:
        result.append(_Suppress(ends, lambda length: length < shortest))
    if prefix_allowed_tokens_fn is not None:
        result.append(_PrefixAllowed(prefix_allowed_tokens_fn, copies))
    if config.forced_bos_token_id is not None:
        result.append(_Force(_forced(config, "forced_bos_token_id", vocabulary), 1))
    if config.forced_eos_token_id is not None:
        result.append(_Force(_forced(config, "forced_eos_token_id", vocabulary), max_length - 1))
    if config.remove_invalid_values:
        result.append(_finite)
    if config.exponential_decay_length_penalty is not None:
        if ends is None:
            raise RequestError("exponential_decay_length_penalty needs an end token; found eos_token_id None. Name one")
        if not isinstance(config.exponential_decay_length_penalty, (list, tuple)) or len(config.exponential_decay_length_penalty) != 2:
            raise RequestError(
                f"exponential_decay_length_penalty must be (start, factor); found {config.exponential_decay_length_penalty!r}"
            )
        start, factor = config.exponential_decay_length_penalty
        result.append(_DecayingLength(start + prompt_length, factor, ends))
    if config.suppress_tokens is not None:
        result.append(_Suppress(config.suppress_tokens, lambda length: True))
    if config.begin_suppress_tokens is not None:
        later = prompt_length <= 1 and config.forced_bos_token_id is not None
        result.append(_Suppress(config.begin_suppress_tokens, lambda length: length == prompt_length + later))
    result += custom
    if config.do_sample:
        at_least = 1 if config.num_beams == 1 else len(ends) + 1 if ends is not None else 2
        result += _sampling_filters(config, at_least)
    if config.renormalize_logits:
        result.append(lambda ids, scores: scores.log_softmax(-1))
    return result


def _sampling_filters(config: GenerationConfig, at_least: int) -> list[Processor]:
    """Those that only sampling has. Each keeps at least `at_least` tokens."""
    result: list[Processor] = []
    temperature = config.temperature
    if temperature is not None and temperature != 1:
        if not temperature > 0 or not math.isfinite(temperature):
            raise RequestError(
                f"temperature must be above 0 with do_sample=True; found {temperature}. For greedy decoding pass do_sample=False"
            )
        result.append(lambda ids, scores: scores / temperature)
    if config.top_k:
        _check("top_k", config.top_k, isinstance(config.top_k, int) and config.top_k > 0, "a whole number, 0 (keep all) or more")
        result.append(_TopK(max(config.top_k, at_least)))
    if config.top_p is not None and config.top_p != 1:
        _check("top_p", config.top_p, 0 <= config.top_p <= 1, "from 0 to 1")
        result.append(_TopP(config.top_p, at_least))
    if config.min_p is not None:
        _check("min_p", config.min_p, 0 <= config.min_p <= 1, "from 0 to 1")
        result.append(_MinP(config.min_p, at_least))
    if config.typical_p is not None and config.typical_p != 1:
        _check("typical_p", config.typical_p, 0 < config.typical_p < 1, "above 0 and at most 1 (keep all)")
        result.append(_Typical(config.typical_p, at_least))
    for name, by_entropy in (("epsilon_cutoff", False), ("eta_cutoff", True)):
        cutoff = getattr(config, name)
        if cutoff:
            _check(name, cutoff, 0 < cutoff < 1, "0 (keep all) or more and below 1")
            result.append(_Cutoff(cutoff, by_entropy, at_least))
    return result


def _check(name: str, value: Any, valid: bool, rule: str) -> None:
    if not valid:
        raise RequestError(f"{name} must be {rule}; found {value}")


def _forced(config: GenerationConfig, name: str, vocabulary: int) -> list[int]:
    """The tokens of an argument that forces them."""
    value = getattr(config, name)
    ids = [value] if isinstance(value, int) else list(value)
    _check(name, value, all(0 <= token < vocabulary for token in ids), f"a token id from 0 to {vocabulary - 1}")
    suppressed = config.suppress_tokens or ()
    _check(name, value, not all(token in suppressed for token in ids), "a token that suppress_tokens does not ban")
    return ids


def _bias_of(value: Mapping[tuple[int, ...], float] | Sequence[Any]) -> dict[tuple[int, ...], float]:
    """The biases by token sequence, from a dictionary or from pairs."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else [(tuple(ids), bias) for ids, bias in value]
        biases = {tuple(int(i) for i in ids): float(bias) for ids, bias in pairs}
    except (TypeError, ValueError):
        biases = {}
    if not biases or () in biases:
        raise RequestError(f"sequence_bias must map sequences of token ids to numbers; found {value!r}")
    return biases


def _bad_words(words: Any, ends: Sequence[int] | None) -> dict[tuple[int, ...], float]:
    if isinstance(words, (str, bytes)) or not len(words) or any(isinstance(word, (str, int)) or not len(word) for word in words):
        raise RequestError(f"bad_words_ids must be a list of lists of token ids; found {words!r}. Encode each word")
    return {tuple(word): -math.inf for word in words if not (len(word) == 1 and word[0] in (ends or ()))}


class _SequenceBias:
    """Adds a bias to the last token of sequences whose other tokens stand at the end."""

    def __init__(self, biases: Mapping[tuple[int, ...], float], vocabulary: int, name: str) -> None:
        for ids in biases:
            if any(not 0 <= token < vocabulary for token in ids):
                raise RequestError(f"{name} must hold token ids from 0 to {vocabulary - 1}; found {list(ids)}")
        self._biases = biases

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros_like(scores)
        for sequence, value in self._biases.items():
            *before, last = sequence
            if len(before) <= ids.shape[1]:
                end = ids[:, ids.shape[1] - len(before) :]
                matches = (end == torch.tensor(before, device=ids.device, dtype=ids.dtype)).all(1)
                bias[:, last] += torch.where(matches.to(scores.device), value, 0.0)
        return scores + bias


class _RepetitionPenalty:
    """Lowers the scores of tokens that a sequence has, leading padding apart."""

    def __init__(self, penalty: float, padding: torch.Tensor | None) -> None:
        self._penalty, self._padding = penalty, padding

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        V = scores.shape[1]
        counted = ids.clamp(max=V)
        if self._padding is not None:
            columns = torch.arange(ids.shape[1], device=ids.device)
            counted = counted.masked_fill(columns < self._padding.to(ids.device)[:, None], V)
        seen = torch.zeros(scores.shape[0], V + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, counted, True)
        lowered = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(seen[:, :V], lowered, scores)


class _NoRepeatNgrams:
    """Bans tokens that would end a sequence of `size` tokens that is there already."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        n, size, V = ids.shape[1], self._size, scores.shape[1]
        if n < size:
            return scores
        windows = ids.unfold(1, size, 1)  # [R, n - size + 1, size]
        repeated = (windows[..., :-1] == ids[:, None, n - size + 1 :]).all(-1)
        banned = torch.zeros(scores.shape[0], V + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, torch.where(repeated, windows[..., -1].clamp(max=V), V), True)
        return scores.masked_fill(banned[:, :V], -math.inf)


class _Suppress:
    """Bans tokens while the length fulfils a condition."""

    def __init__(self, tokens: Sequence[int], applies: Callable[[int], bool]) -> None:
        self._tokens, self._applies = list(tokens), applies

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._applies(ids.shape[1]):
            return scores
        tokens = [token for token in self._tokens if 0 <= token < scores.shape[1]]
        return scores.index_fill(1, torch.tensor(tokens, dtype=torch.int64, device=scores.device), -math.inf)


class _Force:
    """Leaves one of `tokens` at a length of `length` tokens."""

    def __init__(self, tokens: Sequence[int], length: int) -> None:
        self._tokens, self._length = list(tokens), length

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] != self._length:
            return scores
        forced = torch.full_like(scores, -math.inf)
        forced[:, self._tokens] = 0
        return forced


class _PrefixAllowed:
    """Bans all tokens but those that a function of the caller allows."""

    def __init__(self, allowed: Callable[[int, torch.Tensor], list[int]], copies: int) -> None:
        self._allowed, self._copies = allowed, copies

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(scores, -math.inf)
        for row, tokens in enumerate(ids):
            allowed = self._allowed(row // self._copies, tokens)
            if not len(allowed):
                raise RequestError(
                    f"prefix_allowed_tokens_fn must allow at least one token; it returned none for prompt {row // self._copies}"
                )
            mask[row, allowed] = 0
        result = scores + mask
        # Where other processors ban every allowed token of all sequences of a prompt, the constraint goes first.
        impossible = result.amax(-1).isneginf().view(-1, self._copies).all(1).repeat_interleave(self._copies)
        return torch.where(impossible[:, None], mask, result)


class _DecayingLength:
    """Raises the scores of end tokens more with each token after `start`."""

    def __init__(self, start: int, factor: float, ends: Sequence[int]) -> None:
        self._start, self._factor, self._ends = start, factor, list(ends)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beyond = ids.shape[1] - self._start
        if beyond <= 0:
            return scores
        raised = scores.clone()
        of_ends = scores[:, self._ends]
        growth = of_ends.abs() * (self._factor**beyond - 1)
        raised[:, self._ends] = of_ends + growth.masked_fill(~of_ends.isfinite(), 0.0)
        return raised


def _finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(scores.dtype).max
    return scores.nan_to_num(nan=0.0, posinf=largest, neginf=-largest)


class _TopK:
    """Keeps the k best tokens."""

    def __init__(self, k: int) -> None:
        self._k = k

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores < _kth_best(scores, self._k), -math.inf)


class _TopP:
    """Keeps the most probable tokens up to a total probability."""

    def __init__(self, p: float, at_least: int) -> None:
        self._p, self._at_least = p, at_least

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rising, order = scores.sort(-1)
        dropped = rising.softmax(-1).cumsum(-1) <= 1 - self._p
        dropped[:, -self._at_least :] = False
        return scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


class _MinP:
    """Drops tokens less probable than a share of the most probable one."""

    def __init__(self, share: float, at_least: int) -> None:
        self._share, self._at_least = share, at_least

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = scores.softmax(-1)
        dropped = probabilities < self._share * probabilities.amax(-1, keepdim=True)
        best = probabilities.topk(min(self._at_least, scores.shape[1])).indices
        return scores.masked_fill(dropped.scatter(1, best, False), -math.inf)


class _Typical:
    """Keeps the tokens whose surprise is nearest to the entropy, up to a total probability."""

    def __init__(self, mass: float, at_least: int) -> None:
        self._mass, self._at_least = mass, at_least

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_p = scores.log_softmax(-1)
        entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
        distance, order = (-log_p - entropy).abs().sort(-1)
        mass = scores.gather(-1, order).softmax(-1).cumsum(-1)
        last = (mass < self._mass).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        dropped = distance > distance.gather(1, last)
        dropped[:, : self._at_least] = False
        return scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


class _Cutoff:
    """Drops tokens below a probability, which for eta sampling depends on the entropy."""

    def __init__(self, cutoff: float, by_entropy: bool, at_least: int) -> None:
        self._cutoff, self._by_entropy, self._at_least = cutoff, by_entropy, at_least

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = scores.softmax(-1)
        cutoff = torch.tensor(self._cutoff, device=scores.device)
        if self._by_entropy:
            entropy = torch.distributions.Categorical(logits=scores, validate_args=False).entropy()
            cutoff = torch.minimum(cutoff, cutoff.sqrt() * (-entropy).exp())[:, None]
        return scores.masked_fill((probabilities < cutoff) & (scores < _kth_best(scores, self._at_least)), -math.inf)


def _kth_best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """[R, 1], the k-th largest score."""
    return scores.topk(min(k, scores.shape[1])).values[:, -1:]
