"""Quantizes with bitsandbytes through transformers, and writes what they compute: `bitsandbytes_folders.py SRC CONVERTED TOKENS OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

REFERENCE_ROWS = 16
BLOCK = "transformer.blocks.1"
WEIGHTS = tuple(f"{BLOCK}.{name}" for name in ("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.k_proj", "ffn.experts.mlp.2.w2"))


def load(source: Path, settings: BitsAndBytesConfig | None) -> torch.nn.Module:
    """The model in bfloat16 on the CPU, with the rotary embedding that DBRX was trained with."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(config.attn_config.rope_theta)}
    return AutoModelForCausalLM.from_pretrained(
        source, config=config, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=True
    )


def reference(folder: Path, tokens: list[int]) -> dict[str, np.ndarray]:
    """Logits [T, V] of `tokens` and the first rows of some dequantized weights; products in float32."""
    model = load(folder, None)
    weights = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, linear)
            if name in WEIGHTS:
                weights[name] = weight[:REFERENCE_ROWS].numpy()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # `model.float()` is refused for a quantized model
    with torch.no_grad():
        return {"logits": model(torch.tensor([tokens])).logits[0].numpy(), **weights}


def main(published: Path, converted: Path, tokens: Path, out: Path) -> None:
    """Write `bitsandbytes-nf4` of the published layout and `bitsandbytes-nf4-double-converted` of the other."""
    for source, name, double in ((published, "bitsandbytes-nf4", False), (converted, "bitsandbytes-nf4-double-converted", True)):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
        )
        load(source, settings).save_pretrained(out / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(out / name)
        np.savez_compressed(out / name / "reference.npz", **reference(out / name, json.loads(tokens.read_text())))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]))
