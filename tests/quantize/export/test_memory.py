"""The memory that an export announces is what it takes, measured in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dbrx_q.checkpoint.folder import Checkpoint

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
D, F, V = 2048, 6144, 320  # an expert takes 50 MB in float32

EXPORT = """
import re, sys
from pathlib import Path
import torch
from dbrx_q.planning.host_memory import resident_bytes
from dbrx_q.quantize.export.gguf import GgufTarget
from dbrx_q.quantize.export.pieces import working_bytes
from dbrx_q.quantize.export.transformers import TransformersTarget
from dbrx_q.sources.open_weights import open_weights

source, destination, layout = sys.argv[1:]
target = TransformersTarget(torch.float32) if layout == "transformers" else GgufTarget("f32", "model")
with open_weights(Path(source)) as weights:
    limit = resident_bytes() + working_bytes(weights)
    target.write(weights, target.plan(weights), Path(destination), memory=2 * limit)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(peak, limit)
"""


@pytest.fixture(scope="module")
def act_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder with one expert, whose columns have groups in any order: the most that a dequantized matrix takes meanwhile."""
    folder = tmp_path_factory.mktemp("act-order")
    for path in (LAYOUTS / "gptq-4bit-g64-act-order").glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with Checkpoint(LAYOUTS / "published") as published:
        config = {**published.raw_config, "quantization_config": config["quantization_config"]}
    config |= {"d_model": D, "n_heads": 16, "n_layers": 1}
    config["attn_config"] = {**config["attn_config"], "kv_n_heads": 8}
    config["ffn_config"] = {**config["ffn_config"], "ffn_hidden_size": F, "moe_num_experts": 1, "moe_top_k": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    block = "transformer.blocks.0"
    for role, N, K in (("w1", F, D), ("v1", F, D), ("w2", D, F)):
        tensors |= {
            f"{block}.ffn.experts.mlp.0.{role}.qweight": torch.randint(-(2**31), 2**31 - 1, (K // 8, N), generator=generator).int(),
            f"{block}.ffn.experts.mlp.0.{role}.qzeros": torch.full((K // 64, N // 8), 0x77777777, dtype=torch.int32),
            f"{block}.ffn.experts.mlp.0.{role}.scales": torch.rand(K // 64, N, generator=generator).half(),
            f"{block}.ffn.experts.mlp.0.{role}.g_idx": (torch.randperm(K, generator=generator) // 64).int(),
        }
    plain = {
        f"{block}.norm_attn_norm.attn.Wqkv.weight": (2 * D, D),
        f"{block}.norm_attn_norm.attn.out_proj.weight": (D, D),
        f"{block}.norm_attn_norm.norm_1.weight": (D,),
        f"{block}.norm_attn_norm.norm_2.weight": (D,),
        f"{block}.ffn.router.layer.weight": (1, D),
        "transformer.norm_f.weight": (D,),
        "transformer.wte.weight": (V, D),
        "lm_head.weight": (V, D),
    }
    tensors |= {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in plain.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("layout", ["transformers", "gguf"])
def test_the_announced_memory_is_enough(layout: str, act_order: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", EXPORT, act_order, tmp_path / "out", layout], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, limit = map(int, run.stdout.split())
    assert limit / 2 < peak <= limit
