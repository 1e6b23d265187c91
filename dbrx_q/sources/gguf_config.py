"""The configuration of a model by a GGUF file's metadata."""

from __future__ import annotations

import math

from dbrx_q.config import NORM_EPS, DbrxConfig
from dbrx_q.errors import CheckpointError, ConfigError

from .gguf_file import GgufParts
from .gguf_keys import check_keys, rope_scaling_of

__all__ = ["config_of"]


def config_of(parts: GgufParts) -> DbrxConfig:
    """The configuration; its dtype is bfloat16, in which DBRX's weights were published, whatever types the file stores.

    Raises:
        CheckpointError: a file of another architecture, or of a model that is computed otherwise than DBRX.
        ConfigError: a value that no DBRX can have.
    """
    architecture = parts.text("general.architecture")
    if architecture != "dbrx":
        raise CheckpointError(f"{parts.path}: general.architecture must be 'dbrx'; found {architecture!r}. Give a GGUF file of DBRX")
    layers = parts.count("dbrx.block_count")
    if layers > len(parts.tensors):  # before a damaged number takes all memory
        raise CheckpointError(f"{parts.path}: dbrx.block_count says {layers} layers; found {len(parts.tensors)} tensors. Fetch it again")
    epsilon = parts.number("dbrx.attention.layer_norm_epsilon")
    if not math.isclose(epsilon, NORM_EPS, rel_tol=1e-6):
        raise CheckpointError(
            f"{parts.path}: dbrx.attention.layer_norm_epsilon must be DBRX's {NORM_EPS}; found {epsilon}. Convert it again"
        )
    try:
        config = DbrxConfig(
            d_model=parts.count("dbrx.embedding_length"),
            n_heads=parts.count("dbrx.attention.head_count"),
            n_layers=layers,
            max_seq_len=parts.count("dbrx.context_length"),
            vocab_size=len(parts.strings("tokenizer.ggml.tokens")),
            attn_config={
                "clip_qkv": parts.number("dbrx.attention.clamp_kqv") or None,  # llama.cpp does not clamp with 0
                "kv_n_heads": parts.count("dbrx.attention.head_count_kv"),
                "rope_theta": parts.number("dbrx.rope.freq_base"),
            },
            ffn_config={
                "ffn_hidden_size": parts.count("dbrx.feed_forward_length"),
                "moe_num_experts": parts.count("dbrx.expert_count"),
                "moe_top_k": parts.count("dbrx.expert_used_count"),
            },
            torch_dtype="bfloat16",
            rope_scaling=rope_scaling_of(parts),
        )
        check_keys(parts, config.head_dim)
        return config
    except ConfigError as error:
        raise ConfigError(f"{parts.path}: {error}") from None
