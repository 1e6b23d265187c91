"""Packed models in less memory than they take: transformers' max_memory and device maps, and budgets of ours."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dbrx_q import Budget, DbrxConfig, Machine
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.experts.store import ExpertStore
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.transformers import DbrxQConfig

ON_DISK = {f"transformer.blocks.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
ON_DISK |= dict.fromkeys(["transformer.wte", "transformer.rotary_emb", "transformer.norm_f", "lm_head"], "cpu")
BUDGET = Budget(Machine(14_000_000), cache_policy="lru", prefetch=False)


def _store_of(model: Any) -> ExpertStore | None:
    shared = model.transformer.blocks[0].ffn.experts.served_by
    return None if shared is None else shared.store


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto", "max_memory": {"cpu": "3MB"}},
        {"device_map": ON_DISK},
        {"device_map": {"": "disk"}},
        {"quantization_config": DbrxQConfig(ram="14MB")},
        {"quantization_config": {"quant_method": "dbrx_q", "ram": "14MB"}},
        {"quantization_config": DbrxQConfig(budget=BUDGET)},
    ],
    ids=["max_memory", "two layers on disk", "all on disk", "ram", "as a dict", "budget"],
)
def test_experts_that_do_not_fit_stay_in_the_files(
    quantized_nano: Path, in_transformers: Any, ids: torch.Tensor, options: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32, **options)
    store = _store_of(model)
    assert store is not None
    assert torch.equal(model(ids).logits, in_transformers(ids).logits)
    few = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **few), in_transformers.generate(ids, **few))
    stats = store.stats()
    assert stats.cache.misses + stats.cache.prefetch_hits > 0
    assert stats.disk_bytes > 0
    assert not any("experts" in name for name in model.state_dict())
    store.close()


@pytest.mark.parametrize("options", [{}, {"max_memory": {"cpu": "5MB"}}], ids=["free memory", "5 MB"])
def test_what_fits_is_held_in_memory(quantized_nano: Path, in_transformers: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32, device_map="auto", **options)
    assert _store_of(model) is None
    assert torch.equal(model(ids).logits, in_transformers(ids).logits)


def test_too_little_memory_names_the_least(quantized_nano: Path) -> None:
    with pytest.raises(RequestError, match=r"max_memory must leave weights at least 1\.\d+ MB of cpu, .* found 1\.00 MB"):
        AutoModelForCausalLM.from_pretrained(quantized_nano, device_map="auto", max_memory={"cpu": "1MB"})
    with pytest.raises(RequestError, match="the budget is 2,000,000 bytes"):
        AutoModelForCausalLM.from_pretrained(quantized_nano, quantization_config=DbrxQConfig(ram="2MB"))


def test_a_budget_beside_a_device_map_is_refused(quantized_nano: Path) -> None:
    with pytest.raises(RequestError, match="a budget chooses the devices"):
        AutoModelForCausalLM.from_pretrained(quantized_nano, device_map=ON_DISK, quantization_config=DbrxQConfig(ram="14MB"))


def test_a_copy_shares_the_store_and_a_pickle_needs_all_experts(quantized_nano: Path, in_transformers: Any, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32, quantization_config=DbrxQConfig(ram="14MB"))
    twin = copy.deepcopy(model)
    assert _store_of(twin) is _store_of(model)
    assert torch.equal(twin(ids).logits, in_transformers(ids).logits)
    with pytest.raises(UnsupportedError, match="must hold all its experts"):
        pickle.dumps(model)
    restored = pickle.loads(pickle.dumps(in_transformers))
    assert torch.equal(restored(ids).logits, in_transformers(ids).logits)


_PEAK = """
import sys
from pathlib import Path
import dbrx_q.transformers
from transformers import AutoModelForCausalLM
from dbrx_q.planning.host_memory import peak_memory_bytes, resident_bytes

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # imports libraries and compiles kernels
Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which compiling may have raised
before = resident_bytes()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(peak_memory_bytes() - before, model.get_memory_footprint())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of 57 MB, nearly all of it experts."""
    folder = tmp_path_factory.mktemp("large")
    config = DbrxConfig(
        d_model=512, n_heads=4, n_layers=2, vocab_size=512, attn_config={"kv_n_heads": 1},
        ffn_config={"ffn_hidden_size": 1024, "moe_num_experts": 16, "moe_top_k": 2}, torch_dtype="bfloat16",
    )  # fmt: skip
    write_checkpoint(config, folder / "plain")
    request = QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int8", 64)), method="rtn")
    quantize_checkpoint(folder / "plain", folder / "packed", request)
    return folder / "packed"


def test_loading_takes_the_memory_of_the_weights_once(quantized_nano: Path, large: Path) -> None:
    process = subprocess.run([sys.executable, "-c", _PEAK, quantized_nano, large], capture_output=True, text=True, check=True)
    grown, weights = map(int, process.stdout.split()[-2:])
    assert weights > 50_000_000
    assert grown < 1.2 * weights
