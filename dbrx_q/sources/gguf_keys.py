"""Keys of a GGUF file's metadata that give or change results: which are read, and which may be ignored.

Read besides: `dbrx.block_count`, `context_length`, `embedding_length`, `feed_forward_length`, `expert_count`, `expert_used_count`,
`attention.head_count`, `attention.head_count_kv`, `attention.clamp_kqv`, `attention.layer_norm_epsilon`, `rope.freq_base`, and the
tokenizer's (`gguf_tokenizer.py`). Keys that begin with `general.` and `split.` are about the file. Other keys under `dbrx.` are ignored:
llama.cpp reads none of them for DBRX.
"""

from __future__ import annotations

import math
from typing import Any

from dbrx_q.config_values import positive_float, positive_int, shortened
from dbrx_q.errors import CheckpointError

from .gguf_file import GgufParts

__all__ = ["check_keys", "rope_scaling_of"]

_TYPE, _FACTOR, _OLD_FACTOR = "dbrx.rope.scaling.type", "dbrx.rope.scaling.factor", "dbrx.rope.scale_linear"
_ORIGINAL, _ATTENTION = "dbrx.rope.scaling.original_context_length", "dbrx.rope.scaling.attn_factor"
_BETAS = {"beta_fast": "dbrx.rope.scaling.yarn_beta_fast", "beta_slow": "dbrx.rope.scaling.yarn_beta_slow"}
_READ = {
    "dbrx.attention.head_count",
    "dbrx.attention.head_count_kv",
    "dbrx.attention.clamp_kqv",
    "dbrx.attention.layer_norm_epsilon",
    "dbrx.rope.freq_base",
    _TYPE,
    _FACTOR,
    _OLD_FACTOR,
    _ORIGINAL,
    _ATTENTION,
    *_BETAS.values(),
}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "dbrx.attention.causal": (True,),
    "dbrx.attention.max_alibi_bias": (0, 0.0),
    "dbrx.attention.scale": (0, 0.0),
    "dbrx.attention.sliding_window": (0,),
    "dbrx.rope.scaling.finetuned": (True, False),  # a note of how the weights were trained
    "dbrx.rope.scaling.yarn_log_multiplier": (0, 0.0),
    "dbrx.rope.scaling.yarn_ext_factor": (1, 1.0, -1, -1.0),
    "dbrx.rope.scaling.yarn_attn_factor": (1, 1.0, -1, -1.0),
    "dbrx.logit_scale": (0, 0.0, 1, 1.0),
    "dbrx.embedding_scale": (0, 0.0, 1, 1.0),
    "dbrx.residual_scale": (0, 0.0, 1, 1.0),
    "dbrx.expert_shared_count": (0,),
    "dbrx.expert_weights_scale": (0, 0.0, 1, 1.0),
    "dbrx.expert_weights_norm": (True,),
}
"""Keys that would change results, and the values with which they do not."""
_OF_HEADS = ("dbrx.rope.dimension_count", "dbrx.attention.key_length", "dbrx.attention.value_length")
"""Keys that must be the channels of a head."""


def check_keys(parts: GgufParts, head_dim: int) -> None:
    """Refuse keys with which llama.cpp computes something else.

    Args:
        parts: the file.
        head_dim: channels of a head.

    Raises:
        CheckpointError: names the key.
    """
    for key, value in parts.metadata.items():
        if key in _OF_HEADS:
            if value != head_dim:
                raise CheckpointError(
                    f"{parts.path}: {key} must be {head_dim}, the channels of a head of DBRX; found {shortened(value)}. Convert it again"
                )
        elif key in _WITHOUT_EFFECT:
            if value not in _WITHOUT_EFFECT[key]:
                raise CheckpointError(
                    f"{parts.path}: {key} must be absent or {_WITHOUT_EFFECT[key][0]!r}, as for DBRX; found {shortened(value)}. "
                    "Convert it again without it"
                )
        elif key.startswith(("dbrx.rope.", "dbrx.attention.")) and key not in _READ:
            raise CheckpointError(f"{parts.path}: {key} is no key of a DBRX; found {shortened(value)}. Convert it again without it")


def rope_scaling_of(parts: GgufParts) -> dict[str, Any] | None:
    """`rope_scaling` of the configuration, as llama.cpp applies the file's; None where it scales nothing.

    Raises:
        CheckpointError: a type other than "none", "linear" and "yarn".
        ConfigError: a value out of range.
    """
    metadata = parts.metadata
    kind = metadata.get(_TYPE, "linear" if _FACTOR in metadata or _OLD_FACTOR in metadata else "none")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{parts.path}: {_TYPE} must be 'none', 'linear' or 'yarn'; found {shortened(kind)}. Convert it again without"
        )
    factor = metadata.get(_FACTOR, metadata.get(_OLD_FACTOR, 0))
    if kind == "none" or factor == 0:  # llama.cpp takes 0 for no scaling
        return None
    factor = positive_float(_FACTOR if _FACTOR in metadata else _OLD_FACTOR, factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = metadata.get(_ORIGINAL, metadata.get("dbrx.context_length"))
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": positive_int(_ORIGINAL, original, 1 << 24)}
    scaling |= {name: positive_float(key, metadata[key]) for name, key in _BETAS.items() if key in metadata}
    if _ATTENTION in metadata:
        scaling["attention_factor"] = positive_float(_ATTENTION, metadata[_ATTENTION]) * (1 + 0.1 * math.log(max(factor, 1.0)))
    return scaling
