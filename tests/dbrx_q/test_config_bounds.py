"""Numbers that no DBRX can have are refused at once, with short messages."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dbrx_q import DbrxConfig
from dbrx_q.errors import ConfigError

HUGE = 10**400


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_layers": 200_000_000},
        {"d_model": HUGE},
        {"vocab_size": HUGE},
        {"max_seq_len": 1 << 40},
        {"n_heads": 1 << 31},
        {"rope_theta": HUGE},
        {"initializer_range": HUGE},
        {"router_aux_loss_coef": float("nan")},
        {"resid_pdrop": HUGE},
        {"pad_token_id": HUGE},
        {"eos_token_id": [0, HUGE]},
        {"attn_config": {"clip_qkv": HUGE}},
        {"attn_config": {"clip_qkv": float("inf")}},
        {"attn_config": {"rope_theta": HUGE}},
        {"attn_config": {"kv_n_heads": HUGE}},
        {"ffn_config": {"moe_num_experts": 1 << 31}},
        {"ffn_config": {"ffn_hidden_size": HUGE}},
        {"ffn_config": {"moe_normalize_expert_weights": HUGE}},
        {"ffn_config": {"moe_loss_weight": HUGE}},
        {"ffn_config": {"moe_jitter_eps": "0.1"}},
        {"rope_scaling": {"type": "linear", "factor": HUGE}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": HUGE}},
        {"n_layers": "9" * 100_000},
        {"attn_config": ["x"] * 100_000},
        {"torch_dtype": "f" * 100_000},
        {"ffn_config": {"ffn_act_fn": {str(i): i for i in range(100_000)}}},
        {"head_dim": HUGE},
    ],
    ids=lambda value: str(next(iter(value.items())))[:60],
)
def test_impossible_numbers_are_refused_shortly(arguments: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        DbrxConfig(**arguments)
    assert len(str(caught.value)) < 800
    assert time.monotonic() - started < 5


def test_large_models_of_this_kind_are_admitted() -> None:
    config = DbrxConfig(
        d_model=16384,
        n_heads=128,
        n_layers=200,
        max_seq_len=1 << 20,
        vocab_size=1 << 20,
        attn_config={"kv_n_heads": 8, "clip_qkv": 1e6, "rope_theta": 1e9},
        ffn_config={"ffn_hidden_size": 65536, "moe_num_experts": 512, "moe_top_k": 16},
    )
    assert config.head_dim == 128


def test_values_are_checked_when_they_are_set() -> None:
    config = DbrxConfig()
    for name, value in (("n_layers", 0), ("hidden_size", HUGE), ("vocab_size", "3")):
        with pytest.raises(ConfigError, match="must be"):
            setattr(config, name, value)
    with pytest.raises(ConfigError, match="clip_qkv"):
        config.attn_config.clip_qkv = -1.0
