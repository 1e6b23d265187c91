"""Small seeded models of transformers and the same models here, in float32, for the tests of one file to compare.

They have a rotary base that transformers reads: it ignores `attn_config.rope_theta` and takes `rope_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM

VOCABULARY = 97
TOLERANCE = 1e-4
"""Of the largest logit."""


@dataclass(frozen=True)
class Shape:
    """What differs between the models."""

    kv_heads: int = 2
    """Key/value heads of 4 query heads."""
    clip: float | None = None
    """Clamp of queries, keys and values. transformers fails without one, so that its model gets one that clamps nothing."""
    norm_order: float | None = 1.0
    """`moe_normalize_expert_weights`."""
    experts: int = 8
    """Experts of a layer."""
    top_k: int = 3
    """Active experts of a token."""


def make_pair(shape: Shape, seed: int = 0, implementation: str = "eager") -> tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]:
    """Our model and that of transformers with the same random weights, whose router and attention are far from uniform."""
    arguments: dict[str, Any] = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": shape.kv_heads, "clip_qkv": shape.clip, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": shape.experts,
            "moe_top_k": shape.top_k,
            "moe_normalize_expert_weights": shape.norm_order,
            "moe_loss_weight": 0.03,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    attention = {**arguments["attn_config"], "clip_qkv": shape.clip or 1e6}
    config = transformers.DbrxConfig(**(arguments | {"attn_config": attention}), attn_implementation=implementation)
    theirs = transformers.DbrxForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "wte" in name:
            torch.nn.init.normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    ours = DbrxForCausalLM(DbrxConfig(**arguments))
    ours.set_attn_implementation(implementation)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Both are equal to 1e-4 of the largest value; `rows` is a mask of the leading axes, True for what is compared."""
    assert ours.shape == theirs.shape
    if rows is not None:
        ours, theirs = ours[rows], theirs[rows]
    assert (ours.double() - theirs.double()).abs().max() <= TOLERANCE * theirs.abs().max()
