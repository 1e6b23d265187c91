"""Arguments of a forward pass that are names, flags or not used at all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError

from .kv_cache import KVCache

__all__ = ["check_ignored", "named_cache", "wanted_states", "wants_attentions", "wants_mapping"]

_NAMES = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "inputs_embeds",
    "labels",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "shift_labels",
    "ignore_index",
)

# What tokenizers and data collators put into a batch beside the model's inputs, and what says nothing to a model without training.
_WITHOUT_EFFECT = frozenset(
    ("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length", "output_router_probs", "debug_io")
)
_LOSS_ARGUMENTS = frozenset(("num_items_in_batch", "shift_labels", "ignore_index", "labels", "logits_to_keep"))
_PACKED = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


def check_ignored(arguments: Mapping[str, Any]) -> None:
    """Decide on keyword arguments that a forward pass has no parameter for: most are ignored, as in transformers.

    Raises:
        TypeError: a name that resembles a parameter.
        UnsupportedError: an argument that would change the result.
    """
    for name, value in arguments.items():
        if (
            name in _WITHOUT_EFFECT
            or name in _LOSS_ARGUMENTS
            or (value is None and name in _PACKED)
            or (name == "is_causal" and value in (True, None))
        ):
            continue
        if name == "is_causal":
            raise UnsupportedError("is_causal must be True; found False. Pass an attention_mask of 4 dimensions for attention both ways")
        if name in _PACKED:
            raise UnsupportedError(
                f"sequences that lie in one row are told apart by position_ids with use_cache=False; found {name!r}. Leave it out"
            )
        nearest = get_close_matches(name, _NAMES, 1, cutoff=0.8)
        if nearest:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}. Did you mean {nearest[0]!r}?")
        warnings.warn(f"forward() ignores the keyword argument {name!r}, as transformers does", stacklevel=6)


def named_cache(past_key_values: KVCache | None, cache: KVCache | None) -> KVCache | None:
    """The cache under either name.

    Raises:
        RequestError: two different caches.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise RequestError("cache is another name for past_key_values and must be the same object; found two. Pass one of them")
    return past_key_values if cache is None else cache


def wanted_states(config: DbrxConfig, asked: bool | int | Sequence[int] | None, states: int) -> frozenset[int] | None:
    """The indices of the hidden states to return; None to return none.

    Args:
        config: gives the default.
        asked: True for all, False for none; or an index or indices, negative ones from the end, 0 alone for none.
        states: how many there are.

    Raises:
        RequestError: something else.
    """
    asked = getattr(config, "output_hidden_states", False) if asked is None else asked
    if asked is True:
        return frozenset(range(states))
    if not asked:
        return None
    indices = [asked] if isinstance(asked, int) else list(asked)
    if not all(isinstance(index, int) and not isinstance(index, bool) and -states <= index < states for index in indices):
        raise RequestError(f"output_hidden_states must be a boolean, or indices from {-states} to {states - 1}; found {asked!r}")
    return frozenset(index % states for index in indices)


def wants_attentions(config: DbrxConfig, asked: bool | None, implementation: str) -> bool:
    """Whether to return attention weights.

    Raises:
        UnsupportedError: an implementation that does not compute them.
    """
    asked = getattr(config, "output_attentions", False) if asked is None else asked
    if asked and implementation != "eager":
        raise UnsupportedError(
            f"output_attentions needs attn_implementation 'eager', since others compute no attention weights; found {implementation!r}. "
            "Call model.set_attn_implementation('eager')"
        )
    return bool(asked)


def wants_mapping(config: DbrxConfig, asked: bool | None) -> bool:
    """Whether to return an output in place of a tuple."""
    return bool(getattr(config, "return_dict", True) if asked is None else asked)
