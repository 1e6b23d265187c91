"""Reads and checks the arguments of `model.generate`, beside its prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.model.generation_config import GenerationConfig, argument_error, default_of, is_foreign
from dbrx_q.model.modeling import DbrxForCausalLM

from .inputs import PromptBatch

__all__ = ["callables_of", "check_mode", "configuration_of", "either", "end_tokens_of", "set_lengths"]

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Whole numbers, with the smallest that is allowed; None where a rule of its own follows.
_WHOLE: dict[str, int | None] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": 1,
}
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "length_penalty",
    "repetition_penalty",
    "max_time",
)
# Arguments of transformers' generate that are no fields of its configuration, with the values that change nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "synced_gpus": (None, False),
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "custom_generate": (None,),
    "trust_remote_code": (None, False, True),
    "position_ids": (None,),
    "cache_position": (None,),
    "labels": (None,),
    "output_router_logits": (None, False),
    "return_dict": (None, True, False),
    "token_type_ids": (None,),
    "logits_to_keep": (None, 1),
}
_INSTEAD = {
    "assistant_model": "prompt_lookup_num_tokens",
    "position_ids": "attention_mask, of which positions follow",
    "cache_position": "past_key_values, of which it follows",
    "labels": "model(..., labels=...)",
    "output_router_logits": "model(..., output_router_logits=True)",
}
_ARGUMENTS = (
    *("input_ids", "attention_mask", "inputs_embeds", "past_key_values", "cache", "generation_config", "logits_processor"),
    *("stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer", "generator", "seed", "kv_format"),
)


def either(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one of two arguments that was given, if any.

    Raises:
        RequestError: both were.
    """
    if value is not None and other is not None:
        raise RequestError(f"generate() takes {name} or {other_name}; found both. Pass one of them")
    return other if value is None else value


def configuration_of(model: DbrxForCausalLM, given: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """The arguments of a call, with the defaults of the model and of transformers.

    Args:
        model: its `generation_config` has the defaults.
        given: the argument `generation_config`.
        options: the keyword arguments, which take precedence.

    Raises:
        TypeError: an unknown argument; names the nearest one.
        UnsupportedError: an argument of transformers that this version does not have.
        RequestError: a value that is no number where one must be.
    """
    names = [item.name for item in fields(GenerationConfig) if item.name != "others"]
    for name, value in options.items():
        if name in _NEUTRAL:
            if not any(value is neutral for neutral in _NEUTRAL[name]):
                instead = f". Use {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise UnsupportedError(f"generate() does not support {name}; found {type(value).__name__}{instead}")
        elif name not in names and not is_foreign(name):
            raise argument_error(name, [*names, *_ARGUMENTS])
    config = (GenerationConfig() if given is None else GenerationConfig.of(given)).with_defaults(model.generation_config)
    foreign = config.update(**{name: value for name, value in options.items() if name not in _NEUTRAL})
    config.others = {**config.others, **foreign}
    config.complete()
    config.check_supported()
    _check_numbers(config)
    _warn_unused(config, options)
    return config


def callables_of(name: str, values: Sequence[Callable[..., Any] | None] | None) -> list[Callable[..., Any]]:
    """The callables of an argument; those that are None are left out.

    Raises:
        RequestError: no list, or something in it that cannot be called.
    """
    if values is None:
        return []
    if not isinstance(values, (list, tuple)) or any(value is not None and not callable(value) for value in values):
        raise RequestError(f"{name} must be a list of callables; found {values!r}")
    return [value for value in values if value is not None]


def _check_numbers(config: GenerationConfig) -> None:
    """Refuse values of another type, or whole numbers below their least."""
    for name, least in _WHOLE.items():
        value = getattr(config, name)
        valid = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (valid and (least is None or value >= least)):
            rule = "a whole number" if least is None else f"a whole number, at least {least}"
            raise RequestError(f"{name} must be {rule}; found {value!r}")
    for name in _NUMBERS:
        value = getattr(config, name)
        if value is not None and not isinstance(value, Real):
            raise RequestError(f"{name} must be a number; found {value!r}")


def _warn_unused(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Warn of arguments that the mode of the call leaves without effect, as transformers does."""
    unused = [] if config.do_sample else [(name, "do_sample=True") for name in _SAMPLING_ONLY]
    unused += [] if config.num_beams != 1 else [(name, "num_beams above 1") for name in ("length_penalty", "early_stopping")]
    if not config.return_dict_in_generate:
        outputs = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        unused += [(name, "return_dict_in_generate=True") for name in outputs]
    for name, needed in unused:
        if options.get(name) is not None and options[name] != default_of(name):
            warnings.warn(f"{name}={options[name]!r} has no effect without {needed}", stacklevel=6)


def end_tokens_of(config: GenerationConfig) -> list[int] | None:
    """The tokens that end a sequence; None for none."""
    ends: Any = config.eos_token_id
    if ends is None:
        return None
    if isinstance(ends, torch.Tensor):
        ends = ends.flatten().tolist()
    return [ends] if isinstance(ends, int) else list(ends) or None


def set_lengths(model: DbrxForCausalLM, config: GenerationConfig, prompts: PromptBatch, given: Any, options: Mapping[str, Any]) -> int:
    """Columns of a finished sequence; sets `config.min_length` to the columns before which no end token is chosen.

    Args:
        model: its context bounds the length.
        config: of the call, with its defaults.
        prompts: B prompts of S columns.
        given, options: as for `configuration_of`; they tell whether a length was stated.

    Raises:
        RequestError: no room for a new token, or a shortest length above the longest.
    """
    S, context = prompts.columns, model.config.context_length
    before = 0 if prompts.embeddings is None or S else prompts.computed  # embeddings that no column stands for
    stated = [options.get("max_length"), model.generation_config.max_length]
    stated.append(None if given is None else GenerationConfig.of(given).max_length)
    if config.max_new_tokens is not None:
        if config.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1; found {config.max_new_tokens}")
        if options.get("max_length") is not None:
            warnings.warn(f"max_new_tokens={config.max_new_tokens} takes precedence over max_length={config.max_length}", stacklevel=5)
        longest = S + config.max_new_tokens
    elif all(value is None for value in stated):
        warnings.warn("without max_new_tokens or max_length 20 tokens are generated, as in transformers", stacklevel=5)
        longest = min(S + 20, S + context - prompts.longest)
    else:
        longest = (config.max_length or 20) - before
        if longest <= S:
            raise RequestError(
                f"max_length must exceed the {S + before} tokens of the prompts; found {config.max_length}. Raise it or pass max_new_tokens"
            )
    shortest = max((config.min_length or 0) - before, 0)
    if config.min_new_tokens is not None:
        shortest = S + config.min_new_tokens
    config.min_length = shortest
    if shortest > longest:
        raise RequestError(
            f"the shortest length must not exceed the longest; found {shortest} and {longest} tokens with the prompt. Lower "
            f"{'min_length' if config.min_new_tokens is None else 'min_new_tokens'}, or raise max_new_tokens"
        )
    if longest - S > context - prompts.longest:
        room = context - prompts.longest
        warnings.warn(f"the model's context of {context} tokens ends generation after {room} of {longest - S} new tokens", stacklevel=5)
        longest = S + room
    return longest


def check_mode(config: GenerationConfig, prompts: PromptBatch, streamer: Any) -> None:
    """Refuse combinations that cannot be.

    Raises:
        RequestError, UnsupportedError: one of these.
    """
    beams, count = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and streamer is not None:
        raise RequestError(f"a streamer needs num_beams=1, since beams are chosen at the end; found num_beams={beams}")
    if streamer is not None and not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise RequestError(f"a streamer must have the methods put and end; found {type(streamer).__name__}")
    if beams > 1 and count > beams:
        raise RequestError(f"num_return_sequences must be at most num_beams, {beams}; found {count}")
    if beams == 1 and count > 1 and not config.do_sample:
        raise RequestError(f"greedy decoding gives one sequence; found num_return_sequences={count}. Pass do_sample=True or num_beams")
    if config.early_stopping not in (True, False, "never"):
        raise RequestError(f"early_stopping must be True, False or 'never'; found {config.early_stopping!r}")
    if config.prompt_lookup_num_tokens is not None:
        if config.prompt_lookup_num_tokens < 1:
            raise RequestError(f"prompt_lookup_num_tokens must be at least 1; found {config.prompt_lookup_num_tokens}")
        if len(prompts.ids) != 1 or beams > 1:
            raise RequestError(f"prompt_lookup_num_tokens takes one prompt and num_beams=1; found {len(prompts.ids)} sequences")
        for name, given in (("past_key_values", prompts.cache is not None), ("inputs_embeds", prompts.embeddings is not None)):
            if given:
                raise UnsupportedError(f"prompt_lookup_num_tokens does not work with {name}. Leave one of them out")
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(config, name) and config.return_dict_in_generate:
                raise UnsupportedError(f"prompt_lookup_num_tokens does not work with {name}. Leave one of them out")
        if not config.use_cache:
            raise RequestError("prompt_lookup_num_tokens needs use_cache=True; found False")
