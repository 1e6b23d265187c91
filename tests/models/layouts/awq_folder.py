"""Packs a converted checkpoint with AutoAWQ's Linear, and writes what its formula gives: `awq_folder.py CONVERTED OUT --tokens FILE`.

AutoAWQ's own pipeline knows no DBRX, so scales and zero-points are those of each group's range, as its search begins with them. Runs in an
environment with `autoawq`; `make.py` makes one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from awq.models._config import AwqConfig
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from figures import Figures, figures_of_arguments
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

BITS, GROUP = 4, 64
NOT_CONVERTED = ["router", "lm_head"]
BLOCK = "transformer.blocks.1"
WEIGHTS = (f"{BLOCK}.norm_attn_norm.attn.k_proj", f"{BLOCK}.ffn.experts.mlp.2.w1", f"{BLOCK}.ffn.experts.mlp.2.w2")


def pack(linear: torch.nn.Linear) -> WQLinear_GEMM:
    """The Linear with asymmetric codes, rounded to nearest as AutoAWQ's `pseudo_quantize_tensor` does."""
    groups = linear.weight.data.view(linear.out_features, -1, GROUP)  # [N, K / group, group]
    least, greatest = groups.amin(dim=2), groups.amax(dim=2)
    scales = (greatest - least).clamp(min=1e-5) / (2**BITS - 1)
    zeros = (-torch.round(least / scales)).clamp(0, 2**BITS - 1)
    rounded = torch.clamp(torch.round(groups / scales[..., None]) + zeros[..., None], 0, 2**BITS - 1) - zeros[..., None]
    linear.weight.data = (rounded * scales[..., None]).view_as(linear.weight)
    return WQLinear_GEMM.from_linear(linear, BITS, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())


def main(source: Path, out: Path, figures: Figures, only: list[str] | None) -> None:
    """Write `awq-4bit-g64` in `out`, with its figures, unless it is there."""
    folder = out / f"awq-{BITS}bit-g{GROUP}"
    if (only is not None and folder.name not in only) or (folder / "reference.npz").exists():
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, trust_remote_code=True).float()
    tensors, weights = {}, {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in NOT_CONVERTED):
            packed = pack(module)
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in packed.state_dict().items()}
            module.weight.data = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), BITS, GROUP).T.contiguous()
            if name in WEIGHTS:
                weights[name] = module.weight.data.numpy()
        elif getattr(module, "weight", None) is not None:
            tensors[f"{name}.weight"] = module.weight.data.half()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    settings = AwqConfig(w_bit=BITS, q_group_size=GROUP, modules_to_not_convert=NOT_CONVERTED)
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "float16", "quantization_config": settings.to_transformers_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    with torch.no_grad():
        figures.write(folder, lambda ids: model(torch.tensor([ids])).logits[0].numpy(), weights)


if __name__ == "__main__":
    paths, wanted, names = figures_of_arguments("source", "out")
    main(*paths, wanted, names)
