"""Quantizes with bitsandbytes through transformers, and writes what they compute: `bitsandbytes_folders.py SRC CONVERTED OUT`."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch
from figures import Figures, figures_of_arguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BLOCK = "transformer.blocks.1"
WEIGHTS = tuple(f"{BLOCK}.{name}" for name in ("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.k_proj", "ffn.experts.mlp.2.w2"))


def load(source: Path, settings: BitsAndBytesConfig | None) -> torch.nn.Module:
    """The model in bfloat16 on the CPU, with the rotary embedding that DBRX was trained with."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(config.attn_config.rope_theta)}
    return AutoModelForCausalLM.from_pretrained(
        source, config=config, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=True
    )


def write_figures(folder: Path, figures: Figures) -> None:
    """What transformers computes in float32 with the folder's weights, dequantized by bitsandbytes where they are packed."""
    model = load(folder, None)
    weights = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, linear)
            if name in WEIGHTS:
                weights[name] = weight.numpy()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # `model.float()` is refused for a quantized model
    with torch.no_grad():
        figures.write(folder, lambda ids: model(torch.tensor([ids])).logits[0].numpy(), weights)


def main(published: Path, converted: Path, out: Path, figures: Figures, only: list[str] | None) -> None:
    """Write `bitsandbytes-nf4` of the published layout and `bitsandbytes-nf4-double-converted` of the other."""
    for source, name, double in ((published, "bitsandbytes-nf4", False), (converted, "bitsandbytes-nf4-double-converted", True)):
        folder = out / name
        if (only is not None and name not in only) or (folder / "reference.npz").exists():
            continue
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
        )
        load(source, settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, trust_remote_code=True).save_pretrained(folder)
        write_figures(folder, figures)


if __name__ == "__main__":
    paths, wanted, names = figures_of_arguments("published", "converted", "out")
    main(*paths, wanted, names)
