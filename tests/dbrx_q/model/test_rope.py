"""Scaled rotary embeddings against transformers in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.errors import RequestError

SIZES: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": 100}
SECTIONS: dict[str, Any] = {
    "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}


def models(**rope: Any) -> tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]:
    """Both with the same weights. transformers cannot make a model without attn_config.rope_theta, which it ignores."""
    torch.manual_seed(0)
    theta = rope.get("rope_theta") or rope.get("rope_parameters", {}).get("rope_theta", 10000.0)
    sections = SECTIONS | {"attn_config": SECTIONS["attn_config"] | {"rope_theta": theta}}
    theirs = transformers.DbrxForCausalLM(transformers.DbrxConfig(**SIZES, **sections, initializer_range=0.2, **rope)).eval()
    ours = DbrxForCausalLM(DbrxConfig(**SIZES, **SECTIONS, **rope))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 700.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 5000.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "truncate": False}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9}},
    ],
    ids=lambda rope: str(next(iter(rope.values()))),
)
@pytest.mark.parametrize("length", [5, 32])
def test_logits_equal_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    ours, theirs = models(**rope)
    ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (ours(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_dynamic_scaling_grows_with_the_sequence_beyond_the_trained_context() -> None:
    ours, theirs = models(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0})
    plain, _ = models(rope_theta=5000.0)
    ids = torch.randint(0, 100, (1, 64), generator=torch.Generator().manual_seed(0))
    assert ours.config.context_length == 64
    with torch.no_grad():
        expected = theirs(ids[:, :40]).logits, theirs(ids).logits
    assert (ours(ids[:, :40]).logits - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
    assert (ours(ids).logits - expected[1]).abs().max() <= 1e-4 * expected[1].abs().max()
    plain.config.max_seq_len = 64
    assert (plain(ids).logits - expected[1]).abs().max() > 1e-2 * expected[1].abs().max()
    with pytest.raises(RequestError, match="must fit 64 tokens"):
        ours(torch.zeros(1, 65, dtype=torch.long))
