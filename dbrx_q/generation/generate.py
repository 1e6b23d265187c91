"""Continues prompts token by token, and streams the text as it grows.

Dimension letters: `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.kv_cache_file import PromptCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .decoding import decoder_for
from .growing_text import GrowingText
from .sampling import SamplingParams, sample
from .token_loop import prefill_all, token_steps

__all__ = ["Generation", "capacities_of", "check_request", "end_token_ids", "generate", "generate_text", "prompts_of", "stream_text"]


@dataclass
class Generation:
    """The continuation of one prompt."""

    prompt_tokens: int
    """Tokens of the prompt."""
    token_ids: list[int] = field(default_factory=list)
    """The new tokens, without the end token."""
    text: str = ""
    """The text of the new tokens, up to a stop string; empty without a tokenizer."""
    finish_reason: str = ""
    """Why the sequence ended: "eos" (an end token), "stop" (a stop string), "length" (max_new_tokens), "context" (the model's context is
    full) or "memory" (the model's budget has no room for more keys and values)."""
    prefilled_tokens: int = 0
    """Tokens of the prompt that were computed; the others are a prefix that an earlier prompt of the batch has, too, or a saved one."""
    decode_steps: int = -1
    """Tokens that were computed one at a time, an end token included."""
    prefill_seconds: float = 0.0
    """Time until the prompts of the whole batch were computed."""
    decode_seconds: float = 0.0
    """Time from then until this sequence ended."""


def generate(
    model: DbrxForCausalLM,
    prompts: torch.Tensor | Sequence[Sequence[int] | torch.Tensor],
    *,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 128,
    sampling: SamplingParams | None = None,
    eos_token_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    tokenizer: DbrxTokenizer | None = None,
    kv_format: str = "plain",
    on_text: Callable[[int, str], None] | None = None,
    prompt_cache: PromptCache | None = None,
    on_prefilled: Callable[[int, KVCache], None] | None = None,
) -> list[Generation]:
    """Continue every prompt of a batch; prompts may differ in length.

        sampling = SamplingParams(temperature=0.7, seed=1)
        [result] = generate(model, [tokenizer.encode("A mixture of experts is")], sampling=sampling, tokenizer=tokenizer)
        result.text, result.finish_reason

    On the CPU each result is the same, bit for bit, as if its prompt ran alone. On a GPU sequences share products, so the last bits of a
    logit may depend on the rest of the batch.

    Args:
        model: a loaded model.
        prompts: token ids of each prompt: lists, 1-dimensional tensors, or one tensor [B, S].
        attention_mask: [B, S] with a tensor of prompts, 0 for padding on any side; None for no padding.
        max_new_tokens: most tokens to generate for each prompt.
        sampling: how tokens are chosen; None for greedy decoding.
        eos_token_ids: tokens that end a sequence; None for those of `end_token_ids`.
        stop: strings that end a sequence; the text ends before them. One that spells a special token also matches that token. Needs
            `tokenizer`.
        tokenizer: turns tokens into text; without it the results have token ids only.
        kv_format: "plain" stores keys and values in the model's dtype, "int8" and "int4" with a scale per token and head.
        on_text: called with (index of the prompt, new text) whenever text is complete. Needs `tokenizer`.
        prompt_cache: keys and values of a prompt in a file. What prompts share with its beginning is read in place of being computed.
        on_prefilled: called with (index of the prompt, a cache that holds the prompt's keys and values) before the first new token, to
            save them with `PromptCache.save`.

    Returns:
        One result for each prompt, in the order of the prompts.

    Raises:
        RequestError: an empty prompt, a prompt that leaves no room in the context or in the model's budget, a token id out of range, or an
            argument out of range.
    """
    results: list[Generation] = []
    rows = prompts_of(prompts, attention_mask)
    for i, text in _steps(
        model, rows, max_new_tokens, sampling, eos_token_ids, stop, tokenizer, kv_format, results, prompt_cache, on_prefilled
    ):
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
    """The continuation of every text in `prompts`; arguments and errors as for `generate`.

    generate_text(model, tokenizer, ["One prompt", "and a longer one"], max_new_tokens=50, stop=["\n\n"])
    """
    ids = [tokenizer.encode(prompt, split_special_tokens=True) for prompt in prompts]
    results = generate(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, tokenizer=tokenizer, kv_format=kv_format)
    return [result.text for result in results]


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
    """Continue one text and yield the new text piece by piece; arguments and errors as for `generate`.

        for piece in stream_text(model, tokenizer, "A mixture of experts is"):
            print(piece, end="", flush=True)

    A piece has whole characters and no part of a stop string. Generation ends when the iterator is closed, as by leaving the loop. Errors
    are raised when the first piece is asked for.
    """
    ids = [tokenizer.encode(prompt, split_special_tokens=True)]
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
    prompt_cache: PromptCache | None = None,
    on_prefilled: Callable[[int, KVCache], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Generate, and yield (index of the prompt, new text) after every token of every sequence.

    `results` must be an empty list; it receives a result for each prompt, which grows with every token.
    """
    check_request(model.config, prompts, max_new_tokens, stop, tokenizer)
    if prompt_cache is not None and prompt_cache.format != kv_format:
        raise RequestError(
            f"prompt_cache must have the KV format {kv_format}; found {prompt_cache.format}. Name that one, or make it again"
        )
    sampling = sampling or SamplingParams()
    end_tokens = set(end_token_ids(model, tokenizer) if eos_token_ids is None else eos_token_ids)
    results += [Generation(len(prompt)) for prompt in prompts]
    texts = [GrowingText(tokenizer, stop) for _ in prompts]
    generators = sampling.generators(len(prompts))
    excluded = _ids_without_token(model, tokenizer)
    capacities = capacities_of(model, prompts, max_new_tokens, kv_format)
    started, prefilled = time.perf_counter(), 0.0

    def choose(logits: Mapping[int, torch.Tensor]) -> dict[int, int]:
        sequences = {i: [*prompts[i], *results[i].token_ids] for i in logits}
        return {i: sample(row, sampling, sequences[i], generators[i], excluded) for i, row in logits.items()}

    with decoder_for(model, capacities, kv_format) as decoder:
        decoder.prompt_cache = prompt_cache
        first = prefill_all(decoder, prompts)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        prefilled = time.perf_counter()
        for i, result in enumerate(results):
            result.prefilled_tokens = decoder.prefilled[i]
            if on_prefilled is not None:
                on_prefilled(i, decoder.cache_of(i))
        for tokens in token_steps(decoder, first, choose, lambda i: not results[i].finish_reason):
            for i, token in tokens.items():
                result = results[i]
                result.decode_steps += 1
                new_text = ""
                if token in end_tokens:
                    result.finish_reason = "eos"
                else:
                    result.token_ids.append(token)
                    new_text = texts[i].push(token)
                    length = len(prompts[i]) + len(result.token_ids)
                    enough = len(result.token_ids) >= max_new_tokens
                    full = "context" if length >= model.config.max_seq_len else "memory" if length >= capacities[i] else ""
                    result.finish_reason = "stop" if texts[i].stopped else "length" if enough else full
                if result.finish_reason:
                    new_text += texts[i].flush()
                    result.prefill_seconds, result.decode_seconds = prefilled - started, time.perf_counter() - prefilled
                result.text += new_text
                yield i, new_text


def capacities_of(model: DbrxForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, kv_format: str) -> list[int]:
    """Tokens that the KV cache of each sequence has room for.

    That is the prompt and `max_new_tokens`. If the model's budget cannot hold all of them, the longest sequences are cut to one length.

    Raises:
        RequestError: the budget has no room for a new token after a prompt.
    """
    wanted = [min(len(prompt) + max_new_tokens, model.config.max_seq_len) for prompt in prompts]
    kv_bytes = model.limits.kv_bytes
    if kv_bytes is None or not wanted:
        return wanted
    bytes_per_token = KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=kv_format).nbytes
    room = kv_bytes // bytes_per_token
    longest = max(wanted)

    def reserved_tokens(longest: int) -> int:
        lengths = [min(tokens, longest) for tokens in wanted]
        return len(lengths) * max(lengths) if model.transformer.steps_together else sum(lengths)  # one cache, or one per sequence

    while (excess := reserved_tokens(longest) - room) > 0:
        longest -= max(1, excess // len(wanted))
    capacities = [min(tokens, longest) for tokens in wanted]
    for i, (prompt, capacity) in enumerate(zip(prompts, capacities, strict=True)):
        if len(prompt) >= capacity:
            raise RequestError(
                f"the prompts must leave room in the KV cache, which has {kv_bytes:,} bytes; prompt {i} has {len(prompt)} "
                f"tokens and room for {max(0, capacity)}. Load the model with a longer context or a larger batch, or shorten it"
            )
    return capacities


def end_token_ids(model: DbrxForCausalLM, tokenizer: DbrxTokenizer | None, *, chat: bool = False) -> tuple[int, ...]:
    """Ids that end a generation: those of generation_config.json and the tokenizer's end token.

    Args:
        model: its `eos_token_ids` are those of generation_config.json.
        tokenizer: names the end token of a text.
        chat: whether the prompt is a chat; the token that ends a turn in the tokenizer's chat template ends a generation then.
    """
    ends = list(model.eos_token_ids)
    if tokenizer is not None:
        ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends += tokenizer.turn_end_ids() if chat else ()
    return tuple(dict.fromkeys(ends))


def _ids_without_token(model: DbrxForCausalLM, tokenizer: DbrxTokenizer | None) -> torch.Tensor | None:
    """bool [V], True for rows of the head that only pad the vocabulary; None without a tokenizer that could tell."""
    if tokenizer is None:
        return None
    return torch.tensor([not tokenizer.has_token(i) for i in range(model.config.vocab_size)], device=model.device)


def prompts_of(
    prompts: torch.Tensor | Sequence[Sequence[int] | torch.Tensor], attention_mask: torch.Tensor | None = None
) -> list[list[int]]:
    """The ids of each prompt, without padding.

    Args:
        prompts: as for `generate`.
        attention_mask: as for `generate`.

    Raises:
        RequestError: tensors of another shape or of no whole numbers.
    """
    if not isinstance(prompts, torch.Tensor):
        if attention_mask is not None:
            raise RequestError(
                "attention_mask must come with a tensor of prompts [batch, tokens]; found a list. Leave padding out of lists"
            )
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, torch.Tensor):
                _check_ids(prompt, 1, f"prompt {i} must be whole numbers [tokens]")
        return [prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt) for prompt in prompts]
    _check_ids(prompts, 2, "prompts must be whole numbers [batch, tokens]")
    rows: list[list[int]] = prompts.tolist()
    if attention_mask is None:
        return rows
    if attention_mask.shape != prompts.shape:
        raise RequestError(f"attention_mask must be {list(prompts.shape)}, as prompts; found {list(attention_mask.shape)}")
    real = attention_mask.bool().tolist()
    return [[token for token, keep in zip(row, kept, strict=True) if keep] for row, kept in zip(rows, real, strict=True)]


def _check_ids(ids: torch.Tensor, dimensions: int, rule: str) -> None:
    if ids.ndim != dimensions or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RequestError(f"{rule}; found {ids.dtype} {list(ids.shape)}")


def check_request(
    config: DbrxConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], tokenizer: DbrxTokenizer | None
) -> None:
    """Refuse a request that `generate` cannot serve; needs the configuration only, before a model is loaded.

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
        invalid = [token for token in prompt if not 0 <= token < config.vocab_size]
        if invalid:
            raise RequestError(
                f"token ids must be from 0 to {config.vocab_size - 1}; prompt {i} holds {invalid[0]}. Is the tokenizer this model's?"
            )
