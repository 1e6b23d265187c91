"""Memory: a model larger than its budget generates the same text, stays below the budget, and takes the planned memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxConfig, KVCache, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.fallback import FALLBACK_FOLDER
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from dbrx_q import generate
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.host_memory import peak_memory_bytes, resident_bytes
from dbrx_q.model.loading import load_model
from dbrx_q.planning.machine import Gpu, Machine
import torch

warm, folder, ram, direct = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] != "page-cache"
fallback = sys.argv[4] == "fallback"
gpus = [Gpu(int(size) + Gpu(0).reserve) for size in sys.argv[5:]]

def run(folder, ram, fallback, gpus=()):
    cpu = torch.device("cpu")
    budget = Budget(Machine(ram, tuple(gpus)), context=160, step_tokens=128, direct=direct, fallback=fallback, devices=(cpu,) * len(gpus))
    model = load_model(folder, budget=budget)
    # With every prompt, experts get other numbers of tokens.
    tokens = [generate(model, [list(range(2, 2 + n))], max_new_tokens=16)[0].token_ids for n in (128, 117, 103, 90)]
    stats = model.expert_store.stats()
    model.close()
    return tokens[0], stats

for packed in {warm, warm.with_name("int4")} if fallback else {warm}:
    run(packed, 1 << 30, False)  # compiled code and threads do not count
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # otherwise the model would reuse freed memory, and its growth would not show
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far
tokens, stats = run(folder, ram, fallback, gpus)
counters = {"misses": stats.cache.misses, "read": stats.disk_bytes, "fallback_hits": stats.fallback_hits}
print(json.dumps({"tokens": tokens, "grown": peak_memory_bytes() - before} | counters))
"""
RAM = 44 << 20


def make(folder: Path, layers: int) -> None:
    """Write a model of 22 MB a layer at 4 bits to `int4`, and the same at 8 bits with the former as its fallback copy to `int8`."""
    config = DbrxConfig(
        d_model=768,
        n_heads=12,
        n_layers=layers,
        max_seq_len=512,
        vocab_size=1024,
        attn_config={"kv_n_heads": 4},
        ffn_config={"ffn_hidden_size": 1024, "moe_num_experts": 16, "moe_top_k": 4},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, folder / "plain")
    quantize_checkpoint(
        folder / "plain",
        folder / "int4",
        QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int4", 64))),
    )
    int8 = default_formats(config, TensorFormat("int8", 64))
    quantize_checkpoint(folder / "plain", folder / "int8", QuantizationRequest(lambda _: int8))
    (folder / "int8" / FALLBACK_FOLDER).symlink_to(folder / "int4")
    shutil.rmtree(folder / "plain")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 90 MB at 4 bits, of which the budget holds half."""
    folder = tmp_path_factory.mktemp("large")
    make(folder, 4)
    yield folder / "int4"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of that model, whose products have the same shapes: the last layer's experts get only the last token of a prompt."""
    folder = tmp_path_factory.mktemp("warm")
    make(folder, 2)
    return folder / "int4"


@pytest.mark.parametrize("way", ["direct", "page-cache"])
def test_a_model_of_twice_the_budget_stays_below_it(large: Path, warm: Path, way: str) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 1.8 * RAM
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm), str(large), str(RAM), way], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    assert measured["tokens"] == generate(load_model(large), [list(range(2, 130))], max_new_tokens=16)[0].token_ids
    assert measured["misses"] > 0
    assert measured["read"] > size
    assert measured["grown"] <= RAM
    assert measured["grown"] > RAM / 2


def test_a_fallback_copy_stays_within_the_budget(large: Path, warm: Path) -> None:
    folder = large.with_name("int8")
    copy = sum(info.nbytes for name, info in Checkpoint(folder / FALLBACK_FOLDER).infos.items() if ".experts." in name)
    budget = RAM + copy
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 1.2 * budget
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm.with_name("int8")), str(folder), str(budget), "fallback"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    assert measured["fallback_hits"] > 0
    assert copy < measured["grown"] <= budget


def test_gpus_and_the_memory_under_them_stay_below_their_budgets(large: Path, warm: Path) -> None:
    """Two GPUs in host memory: their slots, host slots, staging buffers, and the workspace of experts computed for them."""
    memory = 24 << 20, 20 << 20
    ram = (34 << 20) + 2 * pinned_bytes(Gpu.link)
    command = [sys.executable, "-c", MEASURE, str(warm), str(large), str(ram), "direct", *map(str, memory)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    assert measured["tokens"] == generate(load_model(large), [list(range(2, 130))], max_new_tokens=16)[0].token_ids
    assert measured["read"] > sum(path.stat().st_size for path in large.glob("*.safetensors"))
    budget = sum(memory) + ram - 2 * pinned_bytes(Gpu.link)  # links within host memory have no pinned buffers
    assert budget / 2 < measured["grown"] <= budget


def test_a_loaded_model_takes_the_planned_memory(large: Path) -> None:
    model = load_model(large, budget=Budget(Machine(RAM), context=160, batch=2, step_tokens=128))
    plan, store = model.placement, model.expert_store
    assert plan is not None
    assert isinstance(store, CpuExpertStore)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta)
    cache = KVCache(model.config, 2, 160, dtype=torch.bfloat16)
    for planned, measured in ((plan.host.dense, held), (plan.host.experts, store.tier.nbytes), (plan.host.kv_cache, cache.nbytes)):
        assert measured == pytest.approx(planned, rel=0.03)
    assert RAM - plan.host.total < plan.expert_bytes / plan.experts  # the budget is used
    model.close()
