"""Converts a published checkpoint into Linear weights, as tools need them that quantize Linears: `convert.py SRC DST [--kin KIN]`.

Dimension letters: `E` experts, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["KINS", "convert"]

MODELING = Path(__file__).with_name("modeling_dbrx_converted.py")
KINS = {
    "converted": ("experts.mlp", False),  # ModelCloud's converted-v2
    "whole-qkv": ("experts.mlp", True),
    "experts": ("experts", False),
    "experts-mlp-experts": ("experts.mlp.experts", True),
}
"""Name of a kind of names to what stands before an expert's number, and whether Wqkv stays whole."""


def convert(source: Path, destination: Path, kin: str = "converted", *, modeling: bool = False) -> None:
    """Write the weights of `source` under other names, bit for bit.

    Args:
        source: a published checkpoint of one file.
        destination: folder to write.
        kin: a key of `KINS`.
        modeling: put the classes beside the weights that transformers computes them with.
    """
    prefix, whole = KINS[kin]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    width, experts = config["d_model"], config["ffn_config"]["moe_num_experts"]
    keys = width // config["n_heads"] * config["attn_config"]["kv_n_heads"]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts.mlp." in name:
            block, matrix = name.split(".experts.mlp.")
            for number, weight in enumerate(tensor.chunk(experts)):  # [F, D]
                weight = weight.T if matrix == "w2" else weight  # a Linear's weight is [outputs, inputs]
                tensors[f"{block}.{prefix}.{number}.{matrix}.weight"] = weight.contiguous()
        elif name.endswith("Wqkv.weight") and not whole:
            for letter, weight in zip("qkv", tensor.split([width, keys, keys]), strict=True):
                tensors[name.replace("Wqkv", f"{letter}_proj")] = weight.clone()
        else:
            tensors[name] = tensor
    destination.mkdir(parents=True)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    (destination / "model.safetensors").chmod(0o644)
    config |= {
        "architectures": ["DbrxConvertedForCausalLM"],
        "model_type": "dbrx_converted",
        "auto_map": {
            "AutoConfig": "modeling_dbrx_converted.DbrxConvertedConfig",
            "AutoModelForCausalLM": "modeling_dbrx_converted.DbrxConvertedForCausalLM",
        },
    }
    # transformers 5 reads the base of the rotary embedding here alone, and takes 10000 where it is missing.
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config["attn_config"]["rope_theta"])}
    (destination / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, destination / name)
    if modeling:
        shutil.copyfile(MODELING, destination / MODELING.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--kin", choices=list(KINS), default="converted")
    parser.add_argument("--modeling", action="store_true")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.destination, arguments.kin, modeling=arguments.modeling)
