"""Which keys of config.json are read, ignored and refused. A key of no list is kept and written back, as transformers keeps it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .config_values import shortened
from .errors import ConfigError

__all__ = ["ALIASES", "CONVERTED_TYPE", "FOREIGN_KEYS", "REFUSED_KEYS", "check_arguments", "check_refused", "nearest"]

CONVERTED_TYPE = "dbrx_converted"
"""`model_type` of checkpoints whose experts were divided into linear layers, by which GPTQModel knows them."""

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
}
"""Other names of keys that are read, as in transformers."""

# Keys that are read: the arguments of `DbrxConfig`, `DbrxAttentionConfig` and `DbrxFFNConfig`. Some of them act in training alone and
# change no result of inference: resid_pdrop, emb_pdrop, attn_pdrop, moe_jitter_eps; initializer_range acts on random weights alone.

_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params")
_ABOUT = (
    "architectures",
    "auto_map",
    "model_type",
    "name_or_path",
    "_name_or_path",
    "transformers_version",
    "tokenizer_class",
    "_commit_hash",
)
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "output_scores", "return_dict_in_generate")
_OTHER_TASKS = (
    "add_cross_attention",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "is_decoder",
    "is_encoder_decoder",
    "tie_encoder_decoder",
)
_HOW_IT_RUNS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_experts_implementation",
    "chunk_size_feed_forward",
    "experts_implementation",
    "tf_legacy_loss",
    "torchscript",
    "use_bfloat16",
    "pruned_heads",
)
_GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
FOREIGN_KEYS: dict[str, str] = {
    **dict.fromkeys(_LABELS, "for classifiers, which DBRX is not"),
    **dict.fromkeys(_ABOUT, "about the checkpoint, not about its arithmetic"),
    **dict.fromkeys(_OUTPUTS, "defaults of what `forward` returns; the values are the same"),
    **dict.fromkeys(_OTHER_TASKS, "for encoders and decoders with cross-attention, which DBRX is not"),
    **dict.fromkeys(_HOW_IT_RUNS, "how transformers runs a model; the values are the same"),
    **dict.fromkeys(_GENERATION, "defaults of generation, which generation_config.json holds; transformers 5 drops them here, too"),
}
"""Keys of every configuration of transformers that change no logit of DBRX, and why. A sub-configuration may have all of them, too, beside
`dtype`, `tie_word_embeddings` and the ids of special tokens: published checkpoints carry them there."""

_IN_SECTIONS = ("bos_token_id", "dtype", "eos_token_id", "hidden_size", "pad_token_id", "tie_word_embeddings", "torch_dtype")

REFUSED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((None, True), "DBRX is causal"),
    "layer_types": ((None,), "all layers of DBRX are alike"),
    "partial_rotary_factor": ((None, 1, 1.0), "DBRX rotates all channels of a head"),
    "per_layer_config": ((None, {}), "all layers of DBRX are alike"),
    "rope_parameters": ((None,), "it belongs to the top level of config.json"),
    "rope_scaling": ((None,), "it belongs to the top level of config.json"),
    "sliding_window": ((None,), "DBRX attends to all earlier tokens"),
    "uniform_expert_assignment": ((None, False), "the router of DBRX chooses the experts"),
}
"""Keys that would change results: the values that may be ignored, and why no other can be. `rope_parameters` and `rope_scaling` are read at
the top level and refused in `attn_config` and `ffn_config`."""


def check_arguments(owner: str, foreign: Iterable[str], known: Iterable[str], *, section: bool = False) -> None:
    """Refuse keyword arguments that are neither read nor known to be ignored.

    Raises:
        TypeError: names the nearest argument.
    """
    for name in foreign:
        if name not in FOREIGN_KEYS and name not in REFUSED_KEYS and not (section and name in _IN_SECTIONS):
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}{nearest(name, [*known, *FOREIGN_KEYS])}")


def check_refused(prefix: str, data: Mapping[str, Any], *, read: Iterable[str] = ()) -> None:
    """Refuse values that would change results.

    Args:
        prefix: of the keys in errors, such as "attn_config.".
        data: the keys and values.
        read: keys that the caller reads itself.

    Raises:
        ConfigError: names the key.
    """
    for name, (harmless, reason) in REFUSED_KEYS.items():
        if name in data and name not in read and not any(data[name] is value or data[name] == value for value in harmless):
            raise ConfigError(f"{prefix}{name} must be absent, because {reason}; found {shortened(data[name])}. Remove it")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the name that is spelled most like `name`; empty where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
