"""Small seeded models of transformers and the same models here, for tests of generation."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM

__all__ = ["ENDS", "VOCABULARY", "compare", "make_pair", "padded_prompts"]

VOCABULARY = 97
ENDS: dict[str, Any] = {"eos_token_id": [5, 11], "pad_token_id": 0}


def make_pair(seed: int = 0) -> tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]:
    """Our model and that of transformers with the same random weights, in float32."""
    arguments: dict[str, Any] = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_cache": True,
    }
    torch.manual_seed(seed)
    theirs = transformers.DbrxForCausalLM(transformers.DbrxConfig(**arguments, attn_implementation="eager")).eval()
    for name, parameter in theirs.named_parameters():
        if not ("norm" in name and parameter.ndim == 1):
            torch.nn.init.normal_(parameter, std=1.0 if "wte" in name else 0.15)
    ours = DbrxForCausalLM(DbrxConfig(**arguments))
    ours.set_attn_implementation("eager")
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def padded_prompts() -> dict[str, torch.Tensor]:
    """Two prompts, the first of which has three columns of padding on the left."""
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compare(
    pair: tuple[DbrxForCausalLM, transformers.DbrxForCausalLM], arguments: dict[str, Any], inputs: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Generate with both models from the same state of torch's generator; the tokens must be equal, with and without an output object."""
    inputs = padded_prompts() if inputs is None else inputs
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **arguments))
    assert torch.equal(*outputs)
    if "prompt_lookup_num_tokens" not in arguments:
        torch.manual_seed(0)
        whole = pair[0].generate(**inputs, **arguments, return_dict_in_generate=True)
        assert torch.equal(whole.sequences, outputs[0])
    ours: torch.Tensor = outputs[0]
    return ours
