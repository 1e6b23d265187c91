"""Quantizes a folder with mlx-lm, and writes what MLX computes with each result: `mlx_folders.py SRC OUT --tokens FILE`.

Runs in an environment with `mlx[cpu]` and `mlx-lm`; `make.py` makes one.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from figures import Figures, figures_of_arguments
from mlx.utils import tree_map
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

BLOCK = "transformer.blocks.1"
WEIGHTS = (f"{BLOCK}.norm_attn_norm.attn.Wqkv", f"{BLOCK}.ffn.experts.2.w2", f"{BLOCK}.ffn.router.layer", "transformer.wte")


def mixed(path: str, module: nn.Module) -> bool | dict[str, int]:
    """Plain routers, attention in 8 bits, the rest in 4."""
    if path.endswith("router.layer"):
        return False
    return {"group_size": 64, "bits": 8} if ".attn." in path else True


FOLDERS: dict[str, dict[str, object]] = {
    "mlx-4bit-g64": {},
    "mlx-3bit-g32": {"q_bits": 3, "q_group_size": 32},
    "mlx-6bit-g64-float16": {"q_bits": 6, "dtype": "float16"},
    "mlx-mixed": {"quant_predicate": mixed},
    "mlx-mxfp4": {"q_mode": "mxfp4"},
    "mlx-mxfp8": {"q_mode": "mxfp8"},
    "mlx-nvfp4": {"q_mode": "nvfp4"},
}
"""Name of a folder to the arguments of `mlx_lm.convert` beside quantize=True."""


def write_figures(folder: Path, figures: Figures) -> None:
    """What MLX computes in float32 with the folder's packed weights."""
    model, _ = load_model(folder)
    weights = {}
    for name, module in model.named_modules():
        if name in WEIGHTS:
            rows = module.weight
            if "scales" in module:
                scales, biases = module.scales, module.get("biases")
                if biases is not None:
                    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
                rows = mx.dequantize(rows, scales, biases, group_size=module.group_size, bits=module.bits, mode=module.mode)
            weights[name] = np.array(rows.astype(mx.float32))
    floating = tree_map(lambda part: part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part, model.parameters())
    model.update(floating)
    figures.write(folder, lambda ids: np.array(model(mx.array([ids]))[0]), weights)


def main(source: Path, out: Path, figures: Figures, only: list[str] | None) -> None:
    """Write each folder of `FOLDERS` that is missing in `out`, with its figures."""
    for name, arguments in FOLDERS.items():
        folder = out / name
        if (only is not None and name not in only) or (folder / "reference.npz").exists():
            continue
        if not folder.exists():
            convert(str(source), str(folder), quantize=True, **arguments)
            (folder / "README.md").unlink(missing_ok=True)  # a model card of the hub
        write_figures(folder, figures)


if __name__ == "__main__":
    paths, wanted, names = figures_of_arguments("source", "out")
    main(*paths, wanted, names)
