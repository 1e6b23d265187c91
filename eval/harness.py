"""A model for lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), with the semantics of its own `HFLM`.

Needs the extra `tasks`; `tasks.py` imports this file and says so where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dbrx_q.errors import RequestError, TokenizerError
from dbrx_q.generation import generate
from dbrx_q.model import DbrxForCausalLM
from dbrx_q.sampling import SamplingParams
from dbrx_q.tokenizer import DbrxTokenizer

from .shared_prefix import Continuation, PrefixScorer, TokenCounts

__all__ = ["HarnessModel"]

_NEW_TOKENS = 256  # where a task names no number, as in the harness
_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given wins


class HarnessModel(TemplateLM):  # type: ignore[misc] # the harness ships no types
    """What `lm_eval.simple_evaluate(model=...)` takes.

    Spellings of special tokens in a text are these tokens, as in the tokenizers that the harness uses: only so a chat template works.

    Args:
        model: a loaded model.
        tokenizer: the model's.
        name: of the checkpoint; the harness tells its caches of requests apart by it.
        batch_size: requests that run together.
        kv_format: "plain", "int8" or "int4".
        seed: of sampling; the draws of request i come from seed + i, whatever the batch size. The default is the harness's.
        on_done: called with (requests done, in all) of the kind of request that runs.

    Raises:
        RequestError: a batch size below 1, an unknown format, or a tokenizer without a token to begin an empty context with.
    """

    def __init__(
        self,
        model: DbrxForCausalLM,
        tokenizer: DbrxTokenizer,
        *,
        name: str = "dbrx",
        batch_size: int = 1,
        kv_format: str = "plain",
        seed: int = 1234,
        on_done: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._device = model.device
        self._model, self._name, self._kv_format, self._seed, self._on_done = model, name, kv_format, seed, on_done
        self._scorer = PrefixScorer(model, batch_size=batch_size, kv_format=kv_format)
        ends = [token for token in (tokenizer.eos_token_id, *model.eos_token_ids) if token is not None]
        if not ends:
            raise RequestError("an empty context must have a token to begin with; neither the tokenizer nor the model names an end token")
        self._ends = list(dict.fromkeys(ends))
        self._begin: int = self._ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @property
    def counts(self) -> TokenCounts:
        """Tokens of contexts and continuations so far, and how many of them ran."""
        return self._scorer.counts

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self._begin

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self._model.config.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number."""
        return _NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text; DBRX's tokenizer adds none, whatever `add_special_tokens` says."""
        return self.tokenizer.encode(string, allow_special=True)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt it ends where the last message does, so that it can go on there.

        Raises:
            TokenizerError: no template, messages of another form, or a template that drops the last message.
        """
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt, tokenize=False)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        found = text.rfind(last)
        kept = last if found >= 0 else last.strip()  # templates may strip a message
        found = text.rfind(kept)
        if found < 0:
            raise TokenizerError("a chat that goes on after its last message must hold it; the template changes it. Use another template")
        return text[: found + len(kept)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The harness's: (log-likelihood, whether greedy) of every (context, continuation).

        Raises:
            RequestError: an empty continuation, or one longer than the model's context.
        """
        for request in requests:
            if request.args[1] == "":
                raise RequestError(f"a continuation must hold text; found an empty one after {request.args[0][-60:]!r}. Correct the task")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        scored = self._scorer.score([self._cut(*request) for request in requests], on_scored=self._on_done)
        for (key, _context, _tokens), answer in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token predicted once from as much context as the harness's windows give it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of (context, options), each up to the first of its stop strings or an end token.

        Options: `until`, `max_gen_toks` (or another of its usual names), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`. A context that leaves no room for the new tokens loses its beginning. What prompts of a batch
        begin with is run once, as far as `generate` shares it.

        Raises:
            RequestError: an option that is not known or out of range, or more new tokens than the model's context holds.
        """
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: _key(requests[i].args[1]))  # stable: requests of one kind keep their order
        done = 0
        for _, group in groupby(order, key=lambda i: _key(requests[i].args[1])):
            members = list(group)
            sampling, until, new_tokens = self._options(requests[members[0]].args[1])
            for batch in _batches(members, self.batch_size):
                prompts = [self._prompt(requests[i].args[0], new_tokens) for i in batch]
                found = generate(
                    self._model,
                    prompts,
                    max_new_tokens=new_tokens,
                    sampling=replace(sampling, seed=self._seed + batch[0]),
                    eos_token_ids=self._ends,
                    stop=until,
                    tokenizer=self.tokenizer,
                    kv_format=self._kv_format,
                )
                self.counts.requested += sum(map(len, prompts))
                self.counts.prefilled += sum(generation.prefilled_tokens for generation in found)
                for i, generation in zip(batch, found, strict=True):
                    texts[i] = generation.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, generation.text)
                done += len(batch)
                if self._on_done is not None:
                    self._on_done(done, len(requests))
        return texts

    def _cut(self, key: tuple[str, str] | None, context: list[int], tokens: list[int]) -> Continuation:
        """The last max_length + 1 tokens of a request: the last of these is predicted and never runs."""
        limit = self.max_length
        if not 0 < len(tokens) <= limit:
            what = "" if key is None else f" in {key[1][:60]!r}"
            raise RequestError(f"a continuation must have 1 to {limit} tokens, the model's context; found {len(tokens)}{what}")
        return Continuation(tuple(context[-(limit + 1 - len(tokens)) :]), tuple(tokens))

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self.max_length - new_tokens) :]

    def _options(self, options: Mapping[str, Any]) -> tuple[SamplingParams, list[str], int]:
        """(how to sample, stop strings, new tokens), as the harness reads them: nothing is drawn unless it is asked for."""
        rest = dict(options)
        until = rest.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        named = [int(rest.pop(name)) for name in _NEW_TOKENS_NAMES if rest.get(name) is not None]
        new_tokens = named[0] if named else _NEW_TOKENS
        if not 0 < new_tokens < self.max_length:
            raise RequestError(
                f"max_gen_toks must be from 1 to {self.max_length - 1}, below the model's context; found {new_tokens}. Change the task"
            )
        temperature = rest.pop("temperature", None)
        draws = rest.pop("do_sample", None)
        if draws is None:
            draws = bool(temperature)
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        filters = {name: rest.pop(name) for name in names if rest.get(name) is not None}
        rest = {name: value for name, value in rest.items() if value is not None and name not in _NEW_TOKENS_NAMES}
        if rest.pop("num_beams", 1) != 1 or rest:
            raise RequestError(
                f"generation options of a task must be until, max_gen_toks, do_sample, temperature, {', '.join(names)}; "
                f"found {next(iter(rest), 'num_beams')!r}. Change the task"
            )
        heat = (1.0 if temperature is None else float(temperature)) if draws else 0.0
        return SamplingParams(heat, **filters), [stop for stop in until if stop], new_tokens


def _batches(members: Sequence[int], size: int) -> list[list[int]]:
    """Runs of neighbours, so that the draws of a request do not depend on the batch that it is in."""
    batches: list[list[int]] = []
    for i in members:
        if not batches or len(batches[-1]) == size or i != batches[-1][-1] + 1:
            batches.append([])
        batches[-1].append(i)
    return batches


def _key(options: Mapping[str, Any]) -> str:
    """Equal where options are."""
    return json.dumps(options, sort_keys=True, default=str)
