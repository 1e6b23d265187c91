"""A model stays within its memory budget, and frees the memory when it is dropped."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import generate
from dbrx_q.errors import RequestError
from dbrx_q.experts.gpu_experts import GpuExperts
from dbrx_q.experts.tiered_store import TieredExpertStore
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.host_memory import allowed_bytes, available_bytes
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes

TIMEOUT = 60


@pytest.mark.parametrize("gpus", [(), (2.3,)], ids=["host", "gpu"])
def test_a_dropped_model_is_freed_without_being_closed(quantized_nano: Path, gpus: tuple[float, ...]) -> None:
    """Its slots and threads, once no reference to the model is left."""
    machine = Machine(5 << 20 if gpus else 2_400_000, tuple(Gpu(int(size * 1e6) + Gpu(0).reserve) for size in gpus))
    machine = replace(machine, ram=(machine.ram or 0) + pinned_bytes(Gpu.link) * len(gpus))
    before = set(threading.enumerate())
    budget = Budget(machine, context=100, step_tokens=8, devices=(torch.device("cpu"),) * len(gpus))
    model = load_model(quantized_nano, budget=budget)
    generate(model, [[5, 6, 7]], max_new_tokens=6)
    store = model.expert_store
    assert isinstance(store, TieredExpertStore)
    slots = [store.tier.slots(0), *(gpu._main_pool.slots(gpu.layers[0]) for gpu in getattr(store, "gpus", ()))]
    memory = [weakref.ref(stack) for slots_of_kind in slots for stack in slots_of_kind._stacks]
    threads = set(threading.enumerate()) - before
    assert len(threads) >= 4
    del model, store, slots, budget
    gc.collect()
    assert [stack() for stack in memory] == [None] * len(memory)
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_a_store_of_gpus_that_cannot_be_made_leaves_no_thread(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine((5 << 20) + 2 * pinned_bytes(Gpu.link), tuple(Gpu(int(size * 1e6) + Gpu(0).reserve) for size in (1.6, 1.6)))
    cpu = torch.device("cpu")
    real, instances = GpuExperts.__init__, []

    def fails_second(self: GpuExperts, *arguments: Any, **options: Any) -> None:
        instances.append(self)
        if len(instances) == 2:
            raise torch.OutOfMemoryError("the GPU is full")
        real(self, *arguments, **options)

    monkeypatch.setattr(GpuExperts, "__init__", fails_second)
    before = set(threading.enumerate())
    with pytest.raises(torch.OutOfMemoryError):
        load_model(quantized_nano, budget=Budget(machine, context=64, step_tokens=8, devices=(cpu, cpu)))
    assert set(threading.enumerate()) <= before


def test_a_forward_pass_beyond_the_reserved_memory_is_refused(quantized_nano: Path) -> None:
    model = load_model(quantized_nano, budget=Budget(Machine(3 << 20), context=40, step_tokens=20))
    ids = torch.arange(21)[None]
    with pytest.raises(RequestError, match=r"at most 20 tokens, which the model's budget has memory for; found 21\. Pass fewer"):
        model(ids)
    resident = load_model(quantized_nano)
    first = model(ids[:, :20], use_cache=True)
    second = model(ids[:, 20:], past_key_values=first.past_key_values)
    expected = resident(ids[:, :20], use_cache=True)
    assert torch.equal(second.logits, resident(ids[:, 20:], past_key_values=expected.past_key_values).logits)
    cache = second.past_key_values
    model(torch.zeros(1, 19, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(RequestError, match="a sequence must fit 40 tokens, the room of its cache; found 41"):
        model(torch.tensor([[1]]), past_key_values=cache)
    wide = load_model(quantized_nano, budget=Budget(Machine(3 << 20), context=40))
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :25] = 0  # 35 tokens, and room for 60
    with pytest.raises(RequestError, match=r"20 tokens of 2 sequences; found 30\. Load the model with a longer context or a larger batch"):
        wide(torch.zeros(2, 30, dtype=torch.int64), mask)
    prompt = list(range(5, 35))  # longer than a pass
    assert generate(model, [prompt], max_new_tokens=4)[0].token_ids == generate(resident, [prompt], max_new_tokens=4)[0].token_ids


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_control_groups(tmp_path: Path, version: int) -> None:
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    root = mounted / "memory" if version == 1 else mounted
    first = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
    names = first if version == 1 else ("memory.max", "memory.current", "")
    groups.write_text("5:cpu,cpuacct:/elsewhere\n4:memory:/box/inner\n" if version == 1 else "0::/box/inner\n")
    for folder, most, used, cached in (("box", 900, 500, 100), ("box/inner", "max" if version == 2 else 1 << 60, 300, 0)):
        (root / folder).mkdir(parents=True)
        (root / folder / names[0]).write_text(f"{most}\n")
        (root / folder / names[1]).write_text(f"{used}\n")
        (root / folder / "memory.stat").write_text(f"anon 5\n{names[2]}inactive_file {cached}\n{names[2]}active_file {cached // 2}\n")
    allowed = allowed_bytes(groups, mounted)
    assert min(allowed) == 550  # of the outer one: 900 - 500 + 100 + 50
    assert len(allowed) == 3 - version
    assert allowed_bytes(tmp_path / "nothing", mounted) == []
    assert available_bytes() > 1 << 20
