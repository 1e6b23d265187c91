#!/usr/bin/env bash
# transformers with bitsandbytes (load_in_4bit) leaves DBRX's experts in 16 bits and quantizes the router.
#
# bitsandbytes replaces modules of the class nn.Linear. The experts of a layer are three stacked parameters without such a
# module, so they stay in bfloat16: 96 % of the real model's weights. The router is an nn.Linear and is rounded to 4 bits,
# although it is tiny and decides which experts run. Nothing is reported: the model loads as if it were quantized.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0 bitsandbytes 0.50.2 torch 2.13.0+cpu
#   4 bits  transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight
#   4 bits  transformer.blocks.0.norm_attn_norm.attn.out_proj.weight
#   4 bits  transformer.blocks.0.ffn.router.layer.weight
#   16 bits transformer.blocks.0.ffn.experts.mlp.w1
#   16 bits transformer.blocks.0.ffn.experts.mlp.v1
#   16 bits transformer.blocks.0.ffn.experts.mlp.w2
#   experts are 95% of the bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0
cd "$folder"
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DbrxConfig, DbrxForCausalLM

print(*(f"{name} {version(name)}" for name in ("transformers", "bitsandbytes", "torch")))
config = DbrxConfig(
    d_model=128,
    n_heads=4,
    n_layers=1,
    vocab_size=256,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
    ffn_config={"ffn_hidden_size": 256, "moe_num_experts": 16, "moe_top_k": 4},
)
DbrxForCausalLM(config).to(torch.bfloat16).save_pretrained("plain")
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained("plain", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu")
packed = {name: type(p).__name__ == "Params4bit" for name, p in model.named_parameters()}
for name, in_4_bits in packed.items():
    if ".ffn." in name or ".attn." in name:
        print("4 bits " if in_4_bits else "16 bits", name)
sizes = {name: p.numel() * (1 if packed[name] else 2) for name, p in model.named_parameters()}
experts = sum(size for name, size in sizes.items() if ".experts." in name)
print(f"experts are {experts / sum(sizes.values()):.0%} of the bytes")
router = packed["transformer.blocks.0.ffn.router.layer.weight"]
sys.exit(not router or any(in_4_bits for name, in_4_bits in packed.items() if ".experts." in name))
PYTHON
venv/bin/python finding.py
