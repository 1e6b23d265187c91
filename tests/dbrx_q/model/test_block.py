"""The steps of a block, composed as in calibration, equal the model; sequences in one call attend only to themselves."""

from __future__ import annotations

from pathlib import Path

import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.kernels.linear import linear
from dbrx_q.model.block import attend, expert_hidden, normed, rotation_of, routed


def test_the_steps_of_all_blocks_equal_the_model(nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(nano, dtype=torch.float32)
    config, transformer = model.config, model.transformer
    ids = torch.arange(40).view(1, 40) * 7 % config.vocab_size
    rotation = rotation_of(torch.arange(40, dtype=torch.int32), config)
    x = transformer.wte(ids.flatten(), torch.float32)
    for block in transformer.layers():
        attention = block.norm_attn_norm.attn
        _, h = normed(x, block.norm_attn_norm.norm_1.weight)
        heads = attend(linear(h, attention.Wqkv.weight), rotation, heads=config.n_heads, clip=config.attn_config.clip_qkv)
        x, h = normed(x, block.norm_attn_norm.norm_2.weight, linear(heads.flatten(1), attention.out_proj.weight))
        routing = routed(h, block.ffn.router.layer.weight, config.ffn_config)
        weights = block.ffn.experts.mlp.weights()
        out = torch.zeros_like(x)
        for expert in range(config.ffn_config.moe_num_experts):
            tokens, rank = (routing.experts == expert).nonzero(as_tuple=True)
            hidden = expert_hidden(h[tokens], weights.w1[expert], weights.v1[expert], linear)
            out.index_add_(0, tokens, linear(hidden, weights.w2[expert]) * routing.weights[tokens, rank, None])
        x = x + out
    logits = linear(normed(x, transformer.norm_f.weight)[1], model.lm_head.weight)
    expected = model(ids).logits[0]
    assert (logits - expected).norm() < 1e-5 * expected.norm()


def test_sequences_attend_only_to_themselves() -> None:
    counts, heads, channels = [5, 1, 9], 4, 8
    qkv = 3 * torch.randn(sum(counts), (heads + 2 * 2) * channels, generator=torch.Generator().manual_seed(0))
    angles = torch.cat([torch.arange(count)[:, None] * torch.linspace(1, 0.1, channels // 2) for count in counts])
    rotation = angles.cos(), angles.sin()
    together = attend(qkv, rotation, counts, heads=heads, clip=2.0)
    first = 0
    for count in counts:
        rows = slice(first, first + count)
        alone = attend(qkv[rows].clamp(-2, 2), (rotation[0][rows], rotation[1][rows]), heads=heads)
        assert torch.equal(together[rows], alone)
        first += count
    assert first == len(together)
