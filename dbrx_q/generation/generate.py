"""Generation: one token after another, and text as it grows.

Dimension letters: `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .decoding import decoder_for
from .sampling import SamplingParams, sample

__all__ = ["Generation", "check_request", "generate", "generate_text", "stream_text"]


@dataclass
class Generation:
    """What was generated for one prompt.

    token_ids: the new tokens, without the end token. text: their text, up to a stop string; empty without a tokenizer.
    finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens), "context" (the model's context is full) or "memory" (the budget
    that the model was loaded with has no room for more keys and values).
    prefilled_tokens: of the prompt, those that were run; the others begin an earlier prompt of the batch too.
    decode_steps: tokens that were computed one at a time, an end token included. prefill_seconds, decode_seconds: of the whole batch,
    up to the first token and after it.
    """

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    prefilled_tokens: int = 0
    decode_steps: int = -1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def generate(
    model: DbrxForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | None = None,
    eos_token_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    tokenizer: DbrxTokenizer | None = None,
    kv_format: str = "plain",
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; prompts may differ in length.

    On the CPU each result is, bit for bit, what the prompt alone would give. On a GPU sequences share products: a logit may differ in its
    last bits with what else is in the batch.

    Args:
        model: a loaded model.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens to generate for each.
        sampling: None is greedy.
        eos_token_ids: tokens that end a sequence; None takes all of the checkpoint's generation_config.json.
        stop: strings that end a sequence; they are not part of the text. Needs `tokenizer`.
        tokenizer: turns tokens into text; without it only ids come back.
        kv_format: "plain" keeps keys and values in the model's dtype; "int8" and "int4" quantize them, per token and head.
        on_text: called with (index of the prompt, new text) as soon as text is certain. Needs `tokenizer`.

    Raises:
        RequestError: an empty prompt, ids out of range, a prompt longer than the context, or an argument out of range.
    """
    results: list[Generation] = []
    for i, text in _steps(model, prompts, max_new_tokens, sampling, eos_token_ids, stop, tokenizer, kv_format, results):
        if text and on_text is not None:
            on_text(i, text)
    return results


def generate_text(
    model: DbrxForCausalLM,
    tokenizer: DbrxTokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    kv_format: str = "plain",
) -> list[str]:
    """Continue every text; errors as for `generate`."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    found = generate(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, tokenizer=tokenizer, kv_format=kv_format)
    return [generation.text for generation in found]


def stream_text(
    model: DbrxForCausalLM,
    tokenizer: DbrxTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    kv_format: str = "plain",
) -> Iterator[str]:
    """Continue one text, piece by piece; leaving the loop ends the generation. Errors as for `generate`."""
    ids = [tokenizer.encode(prompt)]
    for _, text in _steps(model, ids, max_new_tokens, sampling, None, stop, tokenizer, kv_format, []):
        if text:
            yield text


def _steps(
    model: DbrxForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams | None,
    eos_token_ids: Sequence[int] | None,
    stop: Sequence[str],
    tokenizer: DbrxTokenizer | None,
    kv_format: str,
    results: list[Generation],
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, new text) for every token of every sequence; `results` is filled on the way."""
    check_request(model.config, prompts, max_new_tokens, stop, tokenizer)
    sampling = sampling or SamplingParams()
    ends = set(model.eos_token_ids if eos_token_ids is None else eos_token_ids)
    results += [Generation(len(prompt)) for prompt in prompts]
    texts = [_GrowingText(tokenizer, stop) for _ in prompts]
    generators = sampling.generators(len(prompts))
    unspoken = _without_a_token(model, tokenizer)
    capacities = _capacities(model, prompts, max_new_tokens, kv_format)
    with decoder_for(model, capacities, kv_format) as decoder:
        started = time.perf_counter()
        logits = {i: decoder.prefill(i, prompt) for i, prompt in enumerate(prompts)}  # of [V]
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        prefilled = time.perf_counter()
        for i, result in enumerate(results):
            result.prefilled_tokens = decoder.prefilled[i]
        while logits:
            for i in logits:
                result = results[i]
                token = sample(logits[i], sampling, [*prompts[i], *result.token_ids], generators[i], unspoken)
                result.decode_steps += 1
                new = ""
                if token in ends:
                    result.finish_reason = "eos"
                else:
                    result.token_ids.append(token)
                    new = texts[i].push(token)
                    held = len(prompts[i]) + len(result.token_ids)
                    done = len(result.token_ids) >= max_new_tokens
                    full = "context" if held >= model.config.max_seq_len else "memory" if held >= capacities[i] else ""
                    result.finish_reason = "stop" if texts[i].stopped else "length" if done else full
                if result.finish_reason:
                    new += texts[i].flush()
                    result.prefill_seconds, result.decode_seconds = prefilled - started, time.perf_counter() - prefilled
                result.text += new
                yield i, new
            going = {i: results[i].token_ids[-1] for i in logits if not results[i].finish_reason}
            logits = decoder.step(going) if going else {}


def _capacities(model: DbrxForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, kv_format: str) -> list[int]:
    """Tokens that every sequence has room for: what is asked for, cut to the same length where the model's budget holds less.

    Raises:
        RequestError: a prompt alone takes more.
    """
    wanted = [min(len(prompt) + max_new_tokens, model.config.max_seq_len) for prompt in prompts]
    kv_bytes = model.limits.kv_bytes
    if kv_bytes is None or not wanted:
        return wanted
    each = KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=kv_format).nbytes
    room = kv_bytes // each
    cut = max(wanted)

    def taken(cut: int) -> int:
        lengths = [min(tokens, cut) for tokens in wanted]
        return len(lengths) * max(lengths) if model.transformer.steps_together else sum(lengths)  # one cache, or one for each

    while (over := taken(cut) - room) > 0:
        cut -= max(1, over // len(wanted))
    found = [min(tokens, cut) for tokens in wanted]
    for i, (prompt, capacity) in enumerate(zip(prompts, found, strict=True)):
        if len(prompt) >= capacity:
            raise RequestError(
                f"the prompts must leave room in the KV cache, which has {kv_bytes:,} bytes; prompt {i} has {len(prompt)} "
                f"tokens and room for {max(0, capacity)}. Load the model with a longer context or a larger batch, or shorten it"
            )
    return found


def _without_a_token(model: DbrxForCausalLM, tokenizer: DbrxTokenizer | None) -> torch.Tensor | None:
    """bool [V]: rows of the head that stand for no token (padding of the vocabulary); None where that is not known."""
    if tokenizer is None:
        return None
    return torch.tensor([not tokenizer.has_token(i) for i in range(model.config.vocab_size)], device=model.device)


class _GrowingText:
    """Text of one sequence: never half a character, and nothing that may yet turn out to be part of a stop string."""

    def __init__(self, tokenizer: DbrxTokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become certain with `token`."""
        return "" if self._decoder is None else self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What is left when no token follows."""
        if self._decoder is None or self.stopped:
            return ""
        certain = self._release(self._decoder.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        return certain + rest

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def check_request(
    config: DbrxConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], tokenizer: DbrxTokenizer | None
) -> None:
    """Refuse what `generate` cannot serve; needs no model.

    Raises:
        RequestError: as for `generate`.
    """
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; found {max_new_tokens}")
    if stop and tokenizer is None:
        raise RequestError("stop strings need a tokenizer; give one or leave them out")
    if "" in stop:
        raise RequestError("a stop string must not be empty; leave it out")
    limit = config.max_seq_len
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"a prompt must hold at least one token; prompt {i} is empty")
        if len(prompt) >= limit:
            raise RequestError(
                f"a prompt must leave room in the model's context of {limit} tokens; prompt {i} has {len(prompt)}. Shorten it"
            )
        bad = [token for token in prompt if not 0 <= token < config.vocab_size]
        if bad:
            raise RequestError(
                f"token ids must be from 0 to {config.vocab_size - 1}; prompt {i} holds {bad[0]}. Is the tokenizer this model's?"
            )
