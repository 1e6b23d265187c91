"""Quantizes with GPTQModel, and writes what it computes with each result: `gptq_folders.py CONVERTED OUT --tokens FILE`.

Runs in an environment with `gptqmodel`; `make.py` makes one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default, half the processors, is too few on two

import torch
from figures import Figures, figures_of_arguments
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.models.definitions.dbrx_converted import DbrxConvertedQModel
from gptqmodel.quantization.config import FORMAT, QuantizeConfig

BLOCK = "transformer.blocks.1"
WEIGHTS = (f"{BLOCK}.norm_attn_norm.attn.k_proj", f"{BLOCK}.ffn.experts.mlp.2.w1", f"{BLOCK}.ffn.experts.mlp.2.w2")

FOLDERS: dict[str, QuantizeConfig] = {
    "gptq-4bit-g128": QuantizeConfig(bits=4, group_size=128),
    "gptq-4bit-g32-asym": QuantizeConfig(bits=4, group_size=32, sym=False),
    "gptq-4bit-g64-act-order": QuantizeConfig(bits=4, group_size=64, desc_act=True, act_group_aware=False),
    "gptq-8bit-g128": QuantizeConfig(bits=8, group_size=128),
    "gptq-v2-4bit-g32-asym": QuantizeConfig(bits=4, group_size=32, sym=False, format=FORMAT.GPTQ_V2),
}
"""Name of a folder to its configuration."""


def calibration(vocabulary: int) -> list[dict[str, list[int]]]:
    """Random token ids: 16 sequences of 128."""
    ids = torch.randint(vocabulary - 4, (16, 128), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 128} for row in ids]


def write_figures(folder: Path, figures: Figures) -> None:
    """What transformers computes in float32 with the weights of GPTQModel's `dequantize_weight`, from float32 scales."""
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16, trust_remote_code=True).model
    weights = {}
    for name, module in list(model.named_modules()):
        if not hasattr(module, "dequantize_weight"):
            continue
        module.scales = module.scales.float()
        weight = module.dequantize_weight().T.float().contiguous()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, linear)
        if name in WEIGHTS:
            weights[name] = weight.numpy()
    model.float()
    with torch.no_grad():
        figures.write(folder, lambda ids: model(torch.tensor([ids])).logits[0].numpy(), weights)


def main(source: Path, out: Path, figures: Figures, only: list[str] | None) -> None:
    """Write each folder of `FOLDERS` that is missing in `out`, with its figures."""
    DbrxConvertedQModel.dynamic_expert_index = "moe_num_experts"  # missing in 7.7.0, which then finds no experts
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    for name, config in FOLDERS.items():
        folder = out / name
        if (only is not None and name not in only) or (folder / "reference.npz").exists():
            continue
        if not folder.exists():
            model = GPTQModel.load(str(source), config, trust_remote_code=True, device="cpu", dtype=torch.bfloat16)
            model.quantize(calibration(vocabulary), batch_size=1)
            model.save(str(folder))
        write_figures(folder, figures)


if __name__ == "__main__":
    paths, wanted, names = figures_of_arguments("source", "out")
    main(*paths, wanted, names)
