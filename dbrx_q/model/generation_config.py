"""Defaults of `model.generate`: `GenerationConfig`, with the names and values of generation_config.json and of transformers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.json_file import read_json_object

__all__ = ["GenerationConfig", "argument_error", "default_of", "is_foreign"]

_FILE = "generation_config.json"

# What an argument is without a value of the caller, the model or the file; None elsewhere.
_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
}

# Arguments of transformers that this version does not have, with the values that change nothing and what to use instead.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_h": ((), "top_p, min_p or typical_p"),
    "encoder_repetition_penalty": ((1.0,), "repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), "no_repeat_ngram_size"),
    "decoder_start_token_id": ((), "input_ids"),
    "token_healing": ((False,), "a prompt that ends with a whole word"),
    "guidance_scale": ((1, 1.0), "logits_processor"),
    "watermarking_config": ((), "logits_processor"),
    "constraints": ((), "prefix_allowed_tokens_fn"),
    "force_words_ids": ((), "prefix_allowed_tokens_fn"),
    "num_beam_groups": ((1,), "num_beams with do_sample=True"),
    "diversity_penalty": ((0.0, 0), "num_beams with do_sample=True"),
    "penalty_alpha": ((0.0, 0), "do_sample=True"),
    "dola_layers": ((), "num_beams"),
    "is_assistant": ((False,), "prompt_lookup_num_tokens"),
    "num_assistant_tokens": ((20,), "prompt_lookup_num_tokens"),
    "num_assistant_tokens_schedule": (("constant",), "prompt_lookup_num_tokens"),
    "assistant_confidence_threshold": ((0.4,), "prompt_lookup_num_tokens"),
    "assistant_early_exit": ((), "prompt_lookup_num_tokens"),
    "assistant_lookbehind": ((10,), "prompt_lookup_num_tokens"),
    "target_lookbehind": ((10,), "prompt_lookup_num_tokens"),
    "assistant_ensemble_weight": ((), "prompt_lookup_num_tokens"),
    "speculation_type": ((), "prompt_lookup_num_tokens"),
    "use_mtp": ((False,), "prompt_lookup_num_tokens"),
    "cache_config": ((), "kv_format"),
    "max_cache_len": ((), "past_key_values, a KVCache of the wanted capacity"),
    "compile_config": ((), "nothing: decode steps on a GPU are CUDA graphs already"),
    "continuous_batching_config": ((), "a batch of prompts"),
    "low_memory": ((False,), "a budget in from_pretrained"),
    "prefill_chunk_size": ((), "a budget in from_pretrained, which sets the tokens of a prefill step"),
}
# Keys that say how a file was written, or name what is never done here.
_METADATA = ("_from_model_config", "transformers_version", "_commit_hash", "disable_compile")
_CACHE_NAMES = (None, "dynamic", "static")


@dataclass(eq=False)
class GenerationConfig:
    """Arguments of `model.generate` by the names of transformers. A field that is None takes the model's default, then transformers'.

    config = GenerationConfig(max_new_tokens=50, do_sample=True, top_p=0.9)
    model.generate(ids, generation_config=config)
    """

    max_length: int | None = None
    """Tokens of a sequence, prompt included; `max_new_tokens` takes precedence. Without both, 20 new tokens are generated."""
    max_new_tokens: int | None = None
    """Most new tokens of a sequence."""
    min_length: int | None = None
    """Tokens, prompt included, before which no end token is chosen."""
    min_new_tokens: int | None = None
    """New tokens before which no end token is chosen; takes precedence over `min_length`."""
    max_time: float | None = None
    """Seconds after which generation ends with the current step."""
    stop_strings: str | Sequence[str] | None = None
    """Strings that end a sequence with the token that completes one; `generate` needs `tokenizer` for them."""
    do_sample: bool | None = None
    """Whether tokens are drawn; False takes the most probable one."""
    num_beams: int | None = None
    """Beams of each prompt; 1 for no beam search."""
    num_return_sequences: int | None = None
    """Sequences returned for each prompt."""
    early_stopping: bool | str | None = None
    """When beam search ends: True with as many complete sequences as beams, False when better are unlikely, "never" when impossible."""
    length_penalty: float | None = None
    """Exponent of the length that divides the score of a complete beam; above 0 favours long ones."""
    temperature: float | None = None
    """Divides the logits before sampling."""
    top_k: int | None = None
    """Sampling keeps the k most probable tokens, 50 by default; 0 keeps all."""
    top_p: float | None = None
    """Sampling keeps the most probable tokens up to this total probability; 1 keeps all."""
    min_p: float | None = None
    """Sampling drops tokens less probable than this share of the most probable one."""
    typical_p: float | None = None
    """Sampling keeps the most typical tokens up to this total probability (Meister et al. 2022); 1 keeps all."""
    epsilon_cutoff: float | None = None
    """Sampling drops tokens below this probability (Hewitt et al. 2022); 0 keeps all."""
    eta_cutoff: float | None = None
    """As `epsilon_cutoff`, relaxed by the entropy of the distribution (Hewitt et al. 2022); 0 keeps all."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative scores of tokens that the sequence has (Keskar et al. 2019); 1 changes nothing."""
    no_repeat_ngram_size: int | None = None
    """Length of token sequences that must not occur twice; 0 for none."""
    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Token sequences that are never generated."""
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None = None
    """A number for each token sequence that is added to the score of its last token after the others."""
    suppress_tokens: Sequence[int] | None = None
    """Tokens that are never chosen."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that are not chosen first."""
    forced_bos_token_id: int | None = None
    """The first new token after a prompt of one token."""
    forced_eos_token_id: int | Sequence[int] | None = None
    """The last token of a sequence that reaches its length."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): from `start` new tokens on, the score of end tokens grows by powers of `factor`."""
    remove_invalid_values: bool | None = None
    """Whether scores that are NaN or infinite are replaced by finite ones."""
    renormalize_logits: bool | None = None
    """Whether scores become log probabilities after all processors."""
    prompt_lookup_num_tokens: int | None = None
    """Tokens that are copied from an earlier match in the sequence and verified in one step; None for none."""
    max_matching_ngram_size: int | None = None
    """Longest match of `prompt_lookup_num_tokens`; 2 by default."""
    use_cache: bool | None = None
    """Whether keys and values are kept; False computes the whole sequence for each token."""
    cache_implementation: str | None = None
    """None, "dynamic" or "static", which mean the same here."""
    return_dict_in_generate: bool | None = None
    """Whether an output object is returned in place of token ids."""
    output_scores: bool | None = None
    """Whether that object has the processed scores of each step."""
    output_logits: bool | None = None
    """Whether that object has the logits of each step."""
    output_hidden_states: bool | None = None
    """Whether that object has the hidden states of each step."""
    output_attentions: bool | None = None
    """Whether that object has the attention weights of each step; needs "eager" attention."""
    bos_token_id: int | None = None
    """The prompt of a call without inputs."""
    eos_token_id: int | Sequence[int] | None = None
    """Tokens that end a sequence."""
    pad_token_id: int | None = None
    """Fills sequences that end before others; None for the first end token."""
    others: dict[str, Any] = field(default_factory=dict)
    """Keys of a file or of a configuration of transformers that are no fields here; `generate` refuses one with an effect."""

    @classmethod
    def of(cls, config: GenerationConfig | Mapping[str, Any] | Any) -> GenerationConfig:
        """A copy of a configuration: ours, one of transformers, or a dictionary.

        Raises:
            RequestError: something else.
        """
        if isinstance(config, cls):
            return copy.deepcopy(config)
        values = config if isinstance(config, Mapping) else config.to_dict() if callable(getattr(config, "to_dict", None)) else None
        if values is None:
            raise RequestError(f"generation_config must be a GenerationConfig or a dictionary; found {type(config).__name__}")
        return cls.from_dict(values)

    @classmethod
    def from_model_config(cls, config: DbrxConfig) -> GenerationConfig:
        """What a model has without generation_config.json: the special tokens that its configuration names."""
        named: dict[str, Any] = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**named)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **values: Any) -> GenerationConfig:
        """The configuration of a dictionary such as generation_config.json holds; `values` take precedence."""
        data = {**config_dict, **values}
        names = {item.name for item in fields(cls)} - {"others"}
        others = {**data.pop("others", {}), **{name: value for name, value in data.items() if name not in names}}
        return cls(**{name: copy.deepcopy(value) for name, value in data.items() if name in names}, others=others)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], config_file_name: str = _FILE, **values: Any
    ) -> GenerationConfig:
        """The configuration in a checkpoint folder; `values` take precedence.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return cls.from_dict(read_json_object(Path(pretrained_model_name) / config_file_name), **values)

    def save_pretrained(self, save_directory: str | os.PathLike[str], config_file_name: str = _FILE) -> None:
        """Write the fields that are set into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / config_file_name).write_text(self.to_json_string(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "others"}
        return copy.deepcopy({**self.others, **{name: value for name, value in named.items() if value is not None}})

    def to_json_string(self) -> str:
        """The JSON of generation_config.json. Keys of `sequence_bias` become lists, which are read again."""
        values = self.to_dict()
        if isinstance(bias := values.get("sequence_bias"), Mapping):
            values["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def update(self, **values: Any) -> dict[str, Any]:
        """Set fields by name; returns the arguments that are no fields."""
        names = {item.name for item in fields(self)} - {"others"}
        for name, value in values.items():
            if name in names:
                setattr(self, name, value)
        return {name: value for name, value in values.items() if name not in names}

    def with_defaults(self, model_defaults: GenerationConfig) -> GenerationConfig:
        """A copy in which fields that are None have the model's value or, without one, transformers'."""
        result = copy.deepcopy(self)
        for item in fields(self):
            if item.name != "others" and getattr(result, item.name) is None:
                value = getattr(model_defaults, item.name)
                setattr(result, item.name, _DEFAULTS.get(item.name) if value is None else copy.deepcopy(value))
        result.others = {**model_defaults.others, **self.others}
        return result

    def complete(self) -> None:
        """Give fields that must have a value, but were set to None, their default."""
        for name in ("num_beams", "num_return_sequences", "length_penalty", "max_length", "use_cache", "early_stopping"):
            if getattr(self, name) is None:
                setattr(self, name, _DEFAULTS[name])

    def check_supported(self) -> None:
        """Refuse what would be ignored.

        Raises:
            UnsupportedError: an argument of transformers that this version does not have, with a value that has an effect.
        """
        for name, value in self.others.items():
            neutral, instead = _UNSUPPORTED.get(name, ((), ""))
            if name in _UNSUPPORTED and value is not None and value not in neutral:
                raise UnsupportedError(f"generate() does not support {name}; found {value!r}. Use {instead}")
        if self.cache_implementation not in _CACHE_NAMES:
            raise UnsupportedError(
                f"cache_implementation must be 'dynamic' or 'static'; found {self.cache_implementation!r}. For a quantized cache pass "
                'kv_format="int8"; to offload weights load the model with a budget'
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and _without_metadata(self) == _without_metadata(other)

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"


def argument_error(name: str, known: Sequence[str]) -> TypeError:
    """For an argument of `generate` that does not exist."""
    nearest = get_close_matches(name, known, 1, cutoff=0.6)
    return TypeError(f"generate() got an unexpected keyword argument {name!r}" + (f". Did you mean {nearest[0]!r}?" if nearest else ""))


def is_foreign(name: str) -> bool:
    """Whether transformers has an argument or a key of this name, which is no field here."""
    return name in _UNSUPPORTED or name in _METADATA


def default_of(name: str) -> Any:
    """The value of a field that nobody set."""
    return _DEFAULTS.get(name)


def _without_metadata(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _METADATA}
