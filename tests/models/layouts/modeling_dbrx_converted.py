"""DBRX with a Linear for each query, key and value projection and for each matrix of an expert, as GPTQModel quantizes it.

`convert.py` puts this file beside the converted weights; transformers imports it from there with `trust_remote_code=True`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.dbrx.configuration_dbrx import DbrxConfig
from transformers.models.dbrx.modeling_dbrx import DbrxForCausalLM


class DbrxConvertedConfig(DbrxConfig):
    """DBRX's configuration, under the model type by which GPTQModel knows converted checkpoints."""

    model_type = "dbrx_converted"

    @property
    def moe_num_experts(self) -> int:
        """The number of experts, where GPTQModel looks for it."""
        return self.ffn_config.moe_num_experts


class Expert(nn.Module):
    """One expert of three Linears, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.v1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The expert's outputs [T, D] of `inputs` [T, D]."""
        return self.w2(nn.functional.silu(self.w1(inputs)) * self.v1(inputs))


class Experts(nn.Module):
    """The experts of a layer; `mlp.{e}.{w1,v1,w2}.weight` are their tensors."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        sizes = config.ffn_config
        self.mlp = nn.ModuleList(Expert(config.d_model, sizes.ffn_hidden_size) for _ in range(sizes.moe_num_experts))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of the chosen experts' outputs, of the shape of `hidden_states` [B, T, D]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.mlp):
            tokens, ranks = torch.where(top_k_index == number)
            if len(tokens):
                out.index_add_(0, tokens, expert(flat[tokens]) * top_k_weights[tokens, ranks, None])
        return out.view_as(hidden_states)


class Projections(nn.Module):
    """Three Linears in the place of the fused one: `q_proj`, `k_proj` and `v_proj` are the attention's own modules."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "attention", attention)  # no submodule, or the weights had two names

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values beside each other, as `Wqkv` gives them."""
        return torch.cat([getattr(self.attention, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj")], dim=-1)


class DbrxConvertedForCausalLM(DbrxForCausalLM):
    """DBRX of the modules above."""

    config_class = DbrxConvertedConfig

    def __init__(self, config: DbrxConvertedConfig) -> None:
        # GPTQModel 7.7.0 replaces it with 10000, which transformers 5 takes where rope_parameters are missing.
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(config.attn_config.rope_theta)}
        super().__init__(config)
        for block in self.transformer.blocks:
            attention = block.norm_attn_norm.attn
            keys = config.d_model // config.n_heads * config.attn_config.kv_n_heads
            attention.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
            attention.k_proj = nn.Linear(config.d_model, keys, bias=False)
            attention.v_proj = nn.Linear(config.d_model, keys, bias=False)
            attention.Wqkv = Projections(attention)
            block.ffn.experts = Experts(config)
        self.post_init()
