"""An adapter for lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), with the semantics of the harness's own `HFLM`.

It needs the extra `tasks`. `run.py` imports this file only when tasks run, and reports a missing extra.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import LM, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dbrx_q.errors import RequestError, TokenizerError
from dbrx_q.generation.generate import generate
from dbrx_q.generation.sampling import SamplingParams
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .answers import Answers, request_key
from .shared_prefix import Continuation, PrefixScorer, TokenCounts

__all__ = ["SEED", "DeferredModel", "HarnessModel", "check_requests"]

SEED = 1234
"""The harness's default seed."""

_NEW_TOKENS = 256  # if a task sets no limit; the harness's default
_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first option given takes effect
_TOP_K = 50  # the default of transformers' `generate`


class HarnessModel(TemplateLM):  # type: ignore[misc] # the harness ships no types
    """A loaded model as `lm_eval.simple_evaluate(model=...)` takes it.

    The text of a special token is encoded as that token, as by the tokenizers that the harness uses; chat templates need this.

    Args:
        model: a loaded model.
        tokenizer: the model's.
        name: of the checkpoint; part of the key of the harness's cache of requests.
        batch_size: requests that run together.
        kv_format: "plain", "int8" or "int4".
        seed: of sampling. Request i samples with seed + i, for every batch size. The default is the harness's.
        answers: of an interrupted run with the same requests; new answers are added and saved as they are computed. With the same batch
            size, the remaining answers are bit-identical to those of an uninterrupted run.
        on_done: called with (requests done, total requests) of the kind of request that runs.

    Raises:
        RequestError: the batch size is below 1, the format is unknown, or neither tokenizer nor model has an end token.
    """

    def __init__(
        self,
        model: DbrxForCausalLM,
        tokenizer: DbrxTokenizer,
        *,
        name: str = "dbrx",
        batch_size: int = 1,
        kv_format: str = "plain",
        seed: int = SEED,
        answers: Answers | None = None,
        on_done: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self._answers = answers or Answers()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._device = model.device
        self._model, self._name, self._kv_format, self._seed, self._on_done = model, name, kv_format, seed, on_done
        self._scorer = PrefixScorer(model, batch_size=batch_size, kv_format=kv_format)
        ends = [token for token in (tokenizer.eos_token_id, *model.eos_token_ids) if token is not None]
        if not ends:
            raise RequestError(
                "an empty context must be replaced by a token; neither the tokenizer nor the model names an end token. Name one there"
            )
        self._ends = list(dict.fromkeys(ends))
        self._begin: int = self._ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @property
    def counts(self) -> TokenCounts:
        """Tokens of the requests so far, tokens that ran for them, and contexts that were truncated."""
        return self._scorer.counts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self._model.dtype

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return self._begin

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self._model.config.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """New tokens if a task sets no limit."""
        return _NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's cache of requests."""
        return _tokenizer_name(self._name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Encode a text. DBRX's tokenizer adds no special tokens, so `add_special_tokens` has no effect."""
        return self.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Without a generation prompt it ends with the last message, so that the model continues that message.

        Raises:
            TokenizerError: there is no template, messages have another form, or the template drops the last message.
        """
        return _chat(self.tokenizer, chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For every (context, continuation): its log-likelihood in nats, and whether greedy decoding would give it.

        Raises:
            RequestError: a continuation is empty or longer than the model's context.
        """
        _check_continuations(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        scored = self._scored("loglikelihood", [self._truncated(*request) for request in requests], range(len(requests)))
        for (key, _context, _tokens), answer in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts. Each token is predicted once, with the context that the harness's windows give it."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append(self._truncated(None, *make_disjoint_window(window)))
                owners.append(i)
        self._answers.done += len(requests) - len(set(owners))  # empty texts
        sums = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self._scored("loglikelihood_rolling", windows, owners), strict=True):
            sums[owner] += value
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for every (context, options), up to the first of its stop strings or an end token.

        Options: `until`, `max_gen_toks` (or another of its usual names), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`. If tokens are sampled and no `top_k` is given, it is 50, as in transformers' `generate`, which the
        harness's own adapter calls (`_get_default_generation_params` in transformers/generation/configuration_utils.py).
        A context that leaves no room for the new tokens is truncated at its beginning. Prompts with greedy decoding run in the order of
        their tokens; `generate` runs the common prefix of a batch's prompts once, as far as it shares prefixes.

        Raises:
            RequestError: an option is unknown or out of range, or asks for more new tokens than the model's context has.
        """
        check_requests("generate_until", requests, self.max_length)
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: _key(requests[i].args[1]))  # stable: requests of one kind keep their order
        done = 0
        for options, group in groupby(order, key=lambda i: _key(requests[i].args[1])):
            members = list(group)
            sampling, until, new_tokens = _options(requests[members[0]].args[1], self.max_length)
            prompts = {i: self._prompt(requests[i].args[0], new_tokens) for i in members}
            if sampling.temperature == 0:
                members.sort(key=prompts.__getitem__)
                batches = [members[first : first + self.batch_size] for first in range(0, len(members), self.batch_size)]
            else:
                batches = _runs(members, self.batch_size)
            for batch in batches:
                keys = [request_key("generate_until", i, prompts[i], options, str(self._seed)) for i in batch]
                if not all(key in self._answers for key in keys):
                    generations = generate(
                        self._model,
                        [prompts[i] for i in batch],
                        max_new_tokens=new_tokens,
                        sampling=replace(sampling, seed=self._seed + batch[0]),
                        eos_token_ids=self._ends,
                        stop=until,
                        tokenizer=self.tokenizer,
                        kv_format=self._kv_format,
                    )
                    for key, generation in zip(keys, generations, strict=True):
                        self._answers.add(key, [generation.text, generation.prefilled_tokens])
                for key, i in zip(keys, batch, strict=True):
                    texts[i], prefilled = self._answers[key]
                    self.counts.requested += len(prompts[i])
                    self.counts.prefilled += prefilled
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                done += len(batch)
                self._answers.done += len(batch)
                self._answers.save(now=False)
                if self._on_done is not None:
                    self._on_done(done, len(requests))
        return texts

    def _scored(self, kind: str, asked: Sequence[Continuation], owners: Sequence[int]) -> list[tuple[float, bool]]:
        """Answers to the continuations `asked`; continuation k is a part of request owners[k]."""
        keys = [request_key(kind, i, continuation.context, continuation.tokens) for i, continuation in enumerate(asked)]
        known = {
            i: (float(value), bool(greedy)) for i, key in enumerate(keys) if key in self._answers for value, greedy in [self._answers[key]]
        }
        open_parts = Counter(owners)

        def on_answers(answers: Mapping[int, tuple[float, bool]]) -> None:
            for i, answer in answers.items():
                self._answers.add(keys[i], answer)
                open_parts[owners[i]] -= 1
                self._answers.done += open_parts[owners[i]] == 0
            self._answers.save(now=False)

        return self._scorer.score(asked, known=known, on_scored=self._on_done, on_answers=on_answers)

    def _truncated(self, key: tuple[str, str] | None, context: list[int], tokens: list[int]) -> Continuation:
        """A request's last max_length + 1 tokens, the last of which is predicted and does not run."""
        limit = self.max_length
        if not 0 < len(tokens) <= limit:
            text = "" if key is None else f" in {key[1][:60]!r}"
            raise RequestError(
                f"a continuation must have 1 to {limit} tokens, the model's context; found {len(tokens)}{text}. Correct the task"
            )
        room = limit + 1 - len(tokens)
        self.counts.truncated += len(context) > room
        return Continuation(tuple(context[-room:]), tuple(tokens))

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - new_tokens
        self.counts.truncated += len(ids) > room
        return ids[-room:]


class DeferredModel(LM):  # type: ignore[misc] # the harness ships no types
    """A model for `lm_eval.simple_evaluate(model=...)` that is loaded only when the harness has created all requests.

    Args:
        tokenizer: the model's.
        name: as for `HarnessModel`.
        start: loads the model; called once, before the first request runs.

    Attributes:
        failure: the error that ended a request, if any; it tells the model's errors from the harness's.
    """

    def __init__(self, tokenizer: DbrxTokenizer, name: str, start: Callable[[], HarnessModel]) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        self._tokenizer, self._name, self._start = tokenizer, name, start
        self._model: HarnessModel | None = None

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's cache of requests."""
        return _tokenizer_name(self._name)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """See `HarnessModel.apply_chat_template`."""
        return _chat(self._tokenizer, chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """See `HarnessModel.loglikelihood`."""
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        """See `HarnessModel.loglikelihood_rolling`."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """See `HarnessModel.generate_until`."""
        return self._ask("generate_until", requests)

    def _ask(self, kind: str, requests: Sequence[Any]) -> Any:
        try:
            if self._model is None:
                self._model = self._start()
            return getattr(self._model, kind)(requests)
        except BaseException as error:
            self.failure = error
            raise


def check_requests(kind: str, requests: Iterable[Any], max_length: int) -> None:
    """Refuse requests that no model with this context could answer. No model needs to be loaded.

    Raises:
        RequestError: a continuation is empty, or as for `HarnessModel.generate_until`.
    """
    if kind == "loglikelihood":
        _check_continuations(requests)
    elif kind == "generate_until":
        for options in {_key(request.args[1]): request.args[1] for request in requests}.values():
            _options(options, max_length)


def _check_continuations(requests: Iterable[Any]) -> None:
    for request in requests:
        if request.args[1] == "":
            raise RequestError(f"a continuation must have text; found an empty one after {request.args[0][-60:]!r}. Correct the task")


def _options(options: Mapping[str, Any], max_length: int) -> tuple[SamplingParams, list[str], int]:
    """(sampling parameters, stop strings, new tokens), read as the harness reads them: decoding is greedy unless a task samples."""
    try:
        return _parsed(options, max_length)
    except RequestError:
        raise
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"generation options of a task must be numbers and strings; found {_key(options)}: {error}. Change the task"
        ) from None


def _parsed(options: Mapping[str, Any], max_length: int) -> tuple[SamplingParams, list[str], int]:
    rest = dict(options)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    limits = [int(rest.pop(name)) for name in _NEW_TOKENS_NAMES if rest.get(name) is not None]
    new_tokens = limits[0] if limits else _NEW_TOKENS
    if not 0 < new_tokens < max_length:
        raise RequestError(
            f"max_gen_toks must be from 1 to {max_length - 1}, below the model's context; found {new_tokens}. Change the task"
        )
    temperature = rest.pop("temperature", None)
    do_sample = rest.pop("do_sample", None)
    if do_sample is None:
        do_sample = bool(temperature)
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    filters = {name: rest.pop(name) for name in names if rest.get(name) is not None}
    rest = {name: value for name, value in rest.items() if value is not None and name not in _NEW_TOKENS_NAMES}
    if rest.pop("num_beams", 1) != 1 or rest:
        raise RequestError(
            f"generation options of a task must be until, max_gen_toks, do_sample, temperature, {', '.join(names)}; "
            f"found {next(iter(rest), 'num_beams')!r}. Change the task"
        )
    temperature = (1.0 if temperature is None else float(temperature)) if do_sample else 0.0
    if do_sample:
        filters.setdefault("top_k", _TOP_K)
    return SamplingParams(temperature, **filters), [stop for stop in until if stop], new_tokens


def _chat(tokenizer: DbrxTokenizer, history: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(history, add_generation_prompt=add_generation_prompt, tokenize=False)
    if add_generation_prompt:
        return text
    message = history[-1]["content"]
    if message not in text:
        message = message.strip()  # templates may strip a message
    start = text.rfind(message)
    if start < 0:
        raise TokenizerError("a chat that continues its last message must contain it; the template changes it. Use another template")
    return text[: start + len(message)]


def _tokenizer_name(name: str) -> str:
    return name.replace("/", "__")


def _runs(members: Sequence[int], size: int) -> list[list[int]]:
    """Batches of consecutive requests, so that the seed of a request does not depend on its batch."""
    batches: list[list[int]] = []
    for i in members:
        if not batches or len(batches[-1]) == size or i != batches[-1][-1] + 1:
            batches.append([])
        batches[-1].append(i)
    return batches


def _key(options: Mapping[str, Any]) -> str:
    """A string that is equal for equal options."""
    return json.dumps(options, sort_keys=True, default=str)
